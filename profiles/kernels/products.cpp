// Matrix products on the CPU with plain, packed and encoded weights, for every dtype: apart from the
// other kernels, because compilers then work on both at once.

#include "encoded_product.h"
#include "group_codes.h"
#include "product.h"

extern "C" void multiply_float32(const Products* p, int threads) {
  multiply_wide<float>(*p, threads);
}
extern "C" void multiply_float16(const Products* p, int threads) {
  multiply_wide<Float16>(*p, threads);
}
extern "C" int multiplies_codes() {
#if defined(HAS_INTEGER_PRODUCTS)
  return 1;
#else
  return 0;
#endif
}
extern "C" void multiply_bfloat16(const Products* p, int threads) {
#if defined(HAS_INTEGER_PRODUCTS)
  if (p->bits && GroupCodes::takes({p->dim, p->group_size, p->bits}))
    return multiply_integers<GroupCodes>(*p, threads);
#endif
  multiply_pairs(*p, threads);
}

#define EXPORT_ENCODED(T, NAME)                                                                \
  extern "C" void unpack_encoded_##NAME(const Encoding* how, const uint8_t* from, long rows,   \
                                        long stride, long first, const float* table, T* to,    \
                                        long out_stride, int threads) {                        \
    unpack_encoded(*how, from, rows, stride, first, table, to, out_stride, threads);           \
  }                                                                                            \
  extern "C" void multiply_encoded_##NAME(const EncodedProducts* p, int threads) {             \
    multiply_encoded<T>(*p, threads);                                                          \
  }
FOR_DTYPES(EXPORT_ENCODED)
