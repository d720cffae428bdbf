#include "common/status.h"

namespace fera {
namespace {
thread_local std::string last_error;
}

void set_last_error(const std::string& sentence) { last_error = sentence; }

}  // namespace fera

extern "C" const char* fera_last_error(void) { return fera::last_error.c_str(); }
extern "C" const char* fera_version(void) { return FERA_VERSION; }
