// Copies an array ``[B, H, L, D]`` of any strides to one whose first axis is the tokens, ``[L, B, H, D]``.
// A block copies the numbers of a token, 16 bytes a thread where it can.
template <typename T, typename Shape, typename Strides>
__device__ void ringattn_pack(const T* from, const Shape& shape, const Strides& strides, T* to) {
  const int heads = shape[1], tokens = shape[2], width = shape[3], rows = shape[0] * heads;
  bool wide = width * sizeof(T) % 16 == 0 && strides[3] == 1 && reinterpret_cast<unsigned long long>(from) % 16 == 0;
  for (int axis = 0; axis < 3; ++axis) wide = wide && (shape[axis] == 1 || strides[axis] * sizeof(T) % 16 == 0);
  const int per_row = wide ? width * sizeof(T) / 16 : width;
  for (int token = blockIdx.x; token < tokens; token += gridDim.x) {
    T* packed = to + static_cast<long long>(token) * rows * width;
    for (int i = threadIdx.x; i < rows * per_row; i += blockDim.x) {
      const int row = i / per_row, column = i - row * per_row;
      const T* source = from + row / heads * strides[0] + row % heads * strides[1] + token * strides[2];
      if (wide) {
        reinterpret_cast<uint4*>(packed)[i] = reinterpret_cast<const uint4*>(source)[column];
      } else {
        packed[i] = source[column * strides[3]];
      }
    }
  }
}
