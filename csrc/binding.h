// What both extension modules use to hand addresses from Python to a struct.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

// A write-only property that takes an address as an integer, as in `tensor.data_ptr()`.
template <class Class, class Owner, class T>
void address(Class& type, const char* name, T* Owner::*field) {
  using Args = typename Class::type;
  type.def_property(name, nullptr, [field](Args& args, uintptr_t at) { args.*field = reinterpret_cast<T*>(at); });
}
