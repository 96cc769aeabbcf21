// What products in integers are made of, on the processors that have fast ones.
#pragma once

#include "vectors.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_INTEGER_PRODUCTS
#include "integers_avx512.h"
#elif defined(HAS_AVX2)
#define HAS_INTEGER_PRODUCTS
#include "integers_avx2.h"
#endif
