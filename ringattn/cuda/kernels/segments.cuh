// Segment ids, tile by tile: bounds are the smallest and the largest id of a tile's queries or keys.

// Whether queries and keys with these bounds share an id; a negative id is padding and is shared by nobody.
RA_FUNC bool share(int2 queries, int2 keys) {
  return max(max(queries.x, keys.x), 0) <= min(queries.y, keys.y);
}

// Whether they all have one and the same id, given that they share one.
RA_FUNC bool all_same(int2 queries, int2 keys) {
  return queries.x == queries.y && keys.x == keys.y && queries.x == keys.x;
}

RA_FUNC int2 bounds_of(const int* bounds, int tile) {
  return make_int2(bounds[2 * tile], bounds[2 * tile + 1]);
}

// The first tile of [tile, last) whose keys share an id with `queries`, or `last`. Each lane looks at another tile.
RA_FUNC int next_shared(int tile, int last, int2 queries, const int* bounds) {
  const int lane = threadIdx.x % 32;
  while (tile < last) {
    const int mine = min(tile + lane, last - 1);
    const unsigned hits = __ballot_sync(ALL_LANES, tile + lane < last && share(queries, bounds_of(bounds, mine)));
    if (hits != 0) {
      return tile + __ffs(hits) - 1;
    }
    tile += 32;
  }
  return last;
}
