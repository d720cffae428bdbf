// The thread's last error sentence, and the macro every check goes through.
#pragma once

#include <sstream>
#include <string>

#include "fera/fera.h"

namespace fera {

void set_last_error(const std::string& sentence);

// "<op>: <argument> must be <rule>, got <value>"
template <class Value>
fera_status invalid(const char* op, const char* argument, const std::string& rule, const Value& value) {
  std::ostringstream out;
  out << op << ": " << argument << " must be " << rule << ", got " << value;
  set_last_error(out.str());
  return FERA_INVALID;
}

}  // namespace fera

#define FERA_CHECK(op, condition, argument, rule, value)                                   \
  do {                                                                                     \
    if (!(condition)) return ::fera::invalid(op, argument, rule, value);                   \
  } while (0)

#define FERA_RETURN_IF_ERROR(expression)                                                   \
  do {                                                                                     \
    const fera_status fera_status_ = (expression);                                         \
    if (fera_status_ != FERA_OK) return fera_status_;                                      \
  } while (0)
