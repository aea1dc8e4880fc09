"""report.html: a run on one page, readable by anybody, with nothing to install or to fetch.

    python -m fastlatent.report RUN

Curves are embedded as PNG and kept under `figures/`; everything a model or a data set wrote is escaped.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from fastlatent import log, manifest
from fastlatent.cli import Parser, run_command
from fastlatent.errors import UserError
from fastlatent.figures import draw, figures_of
from fastlatent.metrics import NAMES
from fastlatent.runfolder import leaves, read_config

NUM_SAMPLES = 6
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 "DejaVu Sans", Verdana, sans-serif; color: #1d2733; background: #fff; max-width: 68rem;
  margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.6rem 0 .8rem; }
p.about { color: #5b6875; margin: 0; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1.2rem; margin: 1.8rem 0 0; }
dt { color: #5b6875; font-size: .8rem; } dd { margin: 0; font-size: 1.4rem; font-variant-numeric: tabular-nums; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1.6rem 2rem; }
figure { margin: 0; } img { width: 100%; display: block; }
figcaption { color: #5b6875; font-size: .85rem; margin-top: .3rem; }
article { border-left: 3px solid #d5dce3; padding: .1rem 0 .1rem 1rem; margin: 0 0 1.4rem; }
article p { margin: 0 0 .4rem; color: #5b6875; font-size: .85rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; font-size: .92rem; margin: 0 0 .5rem; }
pre.prompt { color: #5b6875; }
table { border-collapse: collapse; font-size: .85rem; width: 100%; }
td { border-top: 1px solid #e6eaee; padding: .2rem 1rem .2rem 0; vertical-align: top; overflow-wrap: anywhere; }
td:first-child { color: #5b6875; width: 40%; }
"""


def write_report(folder: Path) -> Path:
    """Write `report.html` and `figures/*.png` of a run folder from its logs; UserError where `folder` is no run."""
    folder = Path(folder)
    config, facts = read_config(folder), manifest.read(folder)
    rows = log.read(folder / "metrics.jsonl")
    samples = log.read(folder / "samples.jsonl")
    figures = "".join(_figure(folder, name, caption, draw_on) for name, caption, draw_on in figures_of(rows))
    page = _page(f"{folder.name}: training report", [
        f"<h1>{escape(folder.resolve().name)}</h1>",
        f'<p class="about">{escape(_about(config, facts))}</p>',
        _headline(rows),
        f'<h2>Curves</h2><div class="figures">{figures}</div>' if figures else "<p>No step has finished yet.</p>",
        _samples(samples),
        _table("Last step", _last_step(rows)),
        _table("Configuration", leaves(config)),
        _table("Where it ran", leaves({key: facts[key] for key in facts if key not in ("config", "sessions")}))])
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _figure(folder: Path, name: str, caption: str, draw_on) -> str:
    buffer = BytesIO()
    draw(draw_on, buffer)
    (folder / "figures").mkdir(exist_ok=True)
    (folder / "figures" / f"{name}.png").write_bytes(buffer.getvalue())
    data = base64.b64encode(buffer.getvalue()).decode()
    caption = escape(caption)
    image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _about(config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    method, model = config["method"]["name"], config["model"]["path"]
    where = ", ".join(facts["hardware"]["gpus"]) or f"{facts['hardware']['cores']} cores of {facts['hardware']['cpu']}"
    return (f"{method} on {model}, {config['num_steps']} steps, seed {config['seed']}, started {facts['started']}, "
            f"{where}")


def _headline(rows: list[dict]) -> str:
    """The few numbers one looks for first: means over the first and the last five steps."""
    steps = [row for row in rows if row.get("reward") is not None]
    held_out = [row["eval/accuracy"] for row in rows if row.get("eval/accuracy") is not None]
    shown = []
    if steps:
        first, last = steps[:5], steps[-5:]
        shown.append(("reward, first → last 5 steps", f"{_mean(first, 'reward'):.3f} → {_mean(last, 'reward'):.3f}"))
        shown.append(("completion tokens, last 5", f"{_mean(last, 'completions/mean_length'):.1f}"))
        if "perf/tokens_per_s" in last[-1]:
            shown.append(("tokens per second, last 5", f"{_mean(last, 'perf/tokens_per_s'):,.0f}"))
    if held_out:
        shown.append(("held-out greedy accuracy", f"{held_out[0]:.3f} → {held_out[-1]:.3f}"))
    return "<dl>" + "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in shown) + "</dl>"


def _mean(rows: list[dict], name: str) -> float:
    values = [row[name] for row in rows if row.get(name) is not None]
    return sum(values) / len(values) if values else float("nan")


def _samples(rows: list[dict]) -> str:
    """Completions of the first and of the last step."""
    if not rows:
        return ""
    first = [row for row in rows if row["step"] == rows[0]["step"]][: NUM_SAMPLES // 3]
    last = [row for row in rows if row["step"] == rows[-1]["step"]][: NUM_SAMPLES - len(first)]
    chosen = first + [row for row in last if row not in first]
    return "<h2>Samples</h2>" + "".join(_sample(row) for row in chosen)


def _sample(row: Mapping[str, Any]) -> str:
    facts = (f"step {row['step']} · reward {row.get('reward')} · answer {row.get('answer')} · "
             f"{row.get('num_tokens')} tokens, {row.get('num_latent')} latent")
    prompt, completion = escape(str(row["prompt"]).strip()), escape(str(row["completion"]).strip())
    return f'<article><p>{escape(facts)}</p><pre class="prompt">{prompt}</pre><pre>{completion}</pre></article>'


def _last_step(rows: list[dict]) -> Iterator[tuple[str, str]]:
    steps = [row for row in rows if "grad_norm" in row]
    for name, value in (steps[-1] if steps else {}).items():
        text = "not finite" if value is None else f"{value:.6g}"
        yield f"{name} ({NAMES[name]})" if name in NAMES else name, text


def _table(title: str, rows: Any) -> str:
    lines = "".join(f"<tr><td>{escape(str(key))}</td><td>{escape(str(value))}</td></tr>" for key, value in rows)
    return f"<h2>{escape(title)}</h2><table>{lines}</table>" if lines else ""


def _page(title: str, parts: list[str]) -> str:
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width">'
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n")


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m fastlatent.report", description=__doc__.partition("\n")[0])
    parser.add_argument("run", metavar="RUN", help="run folder, as printed by training")
    run = Path(parser.parse_args(argv).run)
    try:
        print(write_report(run))
    except OSError as error:
        raise UserError(f"RUN: {error.filename or run} cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    run_command(main)
