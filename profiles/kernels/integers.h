// Vectors of 64 bytes of integers and of 16 floats, for products in integers. GCC 12 would keep a
// vector that is no register in memory.
#pragma once

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_INTEGER_PRODUCTS
#include "integers_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define HAS_INTEGER_PRODUCTS
#include "integers_avx2.h"
#endif
