/* MB_HOST_DEVICE marks the functions that the CPU and the CUDA kernels share. */
#ifndef MODELBATCH_COMMON_HOST_DEVICE_H
#define MODELBATCH_COMMON_HOST_DEVICE_H

#if defined(__CUDACC__)
#define MB_HOST_DEVICE __host__ __device__
#else
#define MB_HOST_DEVICE
#endif

#endif /* MODELBATCH_COMMON_HOST_DEVICE_H */
