// Attention of prompts on the CPU, for every dtype: apart from the other kernels, because compilers
// then work on all at once.

#include "prompt_attention.h"

extern "C" void prompt_attention_float32(const Prompt* p, int threads) {
  prompt_attention<float>(*p, threads);
}
extern "C" void prompt_attention_float16(const Prompt* p, int threads) {
  prompt_attention<Float16>(*p, threads);
}
extern "C" void prompt_attention_bfloat16(const Prompt* p, int threads) {
  prompt_attention<Bfloat16>(*p, threads);
}
