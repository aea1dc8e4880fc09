// How TMA is told of a matrix: the map it takes, which the driver makes.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "head_tile.h"

namespace fastlatent {

// The driver's own function, found at run time: the module links no libcuda.
using Encode = decltype(&cuTensorMapEncodeTiled);
inline cudaError_t find_encode(Encode* encode) {
  void** at = reinterpret_cast<void**>(encode);
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  return cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", at, 12000, cudaEnableDefault, &found);
#else
  return cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", at, cudaEnableDefault, &found);
#endif
}

// A [rows, width] matrix of bfloat16, to be loaded in panels of so many rows; null, or what is wrong.
inline const char* describe(const void* matrix, int64_t rows, int64_t width, int panel_rows, CUtensorMap* map) {
  Encode encode = nullptr;
  if (const cudaError_t error = find_encode(&encode)) return cudaGetErrorString(error);
  if (!encode) return "the driver has no cuTensorMapEncodeTiled";
  const cuuint64_t sizes[2] = {(cuuint64_t)width, (cuuint64_t)rows}, strides[1] = {2 * (cuuint64_t)width};
  const cuuint32_t box[2] = {kPanel, (cuuint32_t)panel_rows}, steps[2] = {1, 1};
  const CUresult result = encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(matrix), sizes, strides, box,
                                 steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refuses the hidden states or the weight";
}

}  // namespace fastlatent
