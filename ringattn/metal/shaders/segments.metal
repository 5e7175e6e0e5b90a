// Segment ids of tiles. Bounds are the smallest and the largest id of a tile's queries or keys.

// Whether queries and keys with these bounds can share an id. A negative id is padding, which no two tokens share.
RA_FUNC bool share(int2 queries, int2 keys) {
  return metal::max(metal::max(queries.x, keys.x), 0) <= metal::min(queries.y, keys.y);
}

// Whether all queries and keys have one and the same id, given that they share one.
RA_FUNC bool all_same(int2 queries, int2 keys) {
  return queries.x == queries.y && keys.x == keys.y && queries.x == keys.x;
}

// The first tile of [tile, last) whose keys share an id with `queries`, or `last`. Each lane checks one tile.
RA_FUNC int next_shared(int tile, int last, int2 queries, const device int* bounds, ushort lane) {
  while (tile < last) {
    const int mine = tile + lane;
    const int there = metal::min(mine, last - 1);
    const bool hit = (mine < last) & share(queries, int2(bounds[2 * there], bounds[2 * there + 1]));
    const int first = metal::simd_min(hit ? mine : last);
    if (first < last) {
      return first;
    }
    tile += 32;
  }
  return last;
}
