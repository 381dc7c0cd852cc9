#include "builtin.h"
#include <errno.h>
int builtin_pack(char **argv) { return builtin_fail_with(ENOSYS, "not there yet", argv[1]); }
