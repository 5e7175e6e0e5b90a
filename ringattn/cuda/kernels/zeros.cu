// Counts that begin at 0, one for each thread

  counts[blockIdx.x * blockDim.x + threadIdx.x] = 0;
