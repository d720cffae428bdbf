// The thread's last error sentence, and the macro every check goes through.
#pragma once

#include <cstdio>
#include <string>
#include <type_traits>

#include "fera/fera.h"

namespace fera {

void set_last_error(const std::string& sentence);

// Values as they read in a sentence. No iostreams: a host process may mix C++ runtimes, and streams are what
// breaks first there.
inline std::string text(const char* v) { return v; }
inline std::string text(const std::string& v) { return v; }
inline std::string text(double v) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%g", v);
  return digits;
}
template <class Integer, std::enable_if_t<std::is_integral_v<Integer>, int> = 0>
std::string text(Integer v) {
  return std::to_string(v);
}

// "<op>: <argument> must be <rule>, got <value>"
template <class Value>
fera_status invalid(const char* op, const std::string& argument, const std::string& rule, const Value& value) {
  set_last_error(std::string(op) + ": " + argument + " must be " + rule + ", got " + text(value));
  return FERA_INVALID;
}

}  // namespace fera

#define FERA_CHECK(op, condition, argument, rule, value)                 \
  do {                                                                   \
    if (!(condition)) return ::fera::invalid(op, argument, rule, value); \
  } while (0)

#define FERA_RETURN_IF_ERROR(expression)              \
  do {                                                \
    const fera_status fera_status_ = (expression);    \
    if (fera_status_ != FERA_OK) return fera_status_; \
  } while (0)
