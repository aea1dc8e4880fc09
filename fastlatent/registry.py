"""Families of interchangeable parts: one module each, found by being in the folder, or named by a dotted path."""

from __future__ import annotations

import importlib
import pkgutil

from fastlatent.errors import UserError


class Family:
    """The members of one package, by name. A member registers itself; its module is imported when it is asked for."""

    def __init__(self, package: str, kind: str):
        self.package, self.kind = package, kind
        self._members: dict[str, object] = {}

    def register(self, name: str):
        """Decorator: add a class or function under `name`, and leave the name on it as `.name`."""

        def add(member):
            if name in self._members:
                raise ValueError(f"{self.package}: two members are named {name!r}")
            member.name = name
            self._members[name] = member
            return member

        return add

    def names(self) -> list[str]:
        """Every member's name; imports the whole folder."""
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__, f"{self.package}."):
            importlib.import_module(module.name)
        return sorted(self._members)

    def find(self, name: str, where: str):
        """The member called `name`, or the object at that dotted path; UserError naming the config key `where`."""
        if "." in name or ":" in name:
            return import_own(name, where)
        if name not in self._members:
            known = self.names()
            if name not in known:
                raise UserError(f"{where}: {name!r} is not one of {', '.join(known)}, nor a dotted path to your own")
        return self._members[name]


def import_own(path: str, where: str):
    """The object of a user's own at `package.module:name` or `package.module.name`; UserError where it cannot be had."""
    module_name, _, attribute = path.rpartition(":" if ":" in path else ".")
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise UserError(f"{where}: {path!r} is no dotted path; f in a file own.py here is own.f")
    try:
        return import_path(path, where)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise UserError(f"{where}: importing {path!r} failed with {type(error).__name__}: {error}") from error


def import_path(path: str, where: str):
    """The object at `package.module:name` or `package.module.name`; UserError where there is none."""
    module_name, _, attribute = path.rpartition(":" if ":" in path else ".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"{where}: {path!r}: no module named {error.name!r} can be imported from here") from None
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise UserError(f"{where}: module {module_name!r} has no {attribute!r}") from None
