// cuda_runtime.h of this folder comes first in the include path.
#include "cuda/kernels.cu"
