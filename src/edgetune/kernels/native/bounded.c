/* The error-bounded codec, for float32. */
#include "bounded_encode.c"
#include "bounded_decode.c"
