/* Redirection of MLX's float32 matrix products on Linux to the BLAS in NumPy's wheel.

   MLX's CPU wheel for Linux resolves cblas_sgemm to a reference BLAS, some twenty times slower. NumPy's wheel exports
   the same function under another name, with 64-bit sizes. MLX's library calls cblas_sgemm through an entry of its
   global offset table, which the loader fills in. `ringattn_redirect` writes the function below into that entry. Other
   libraries are not affected. MLX may be loaded at any time before the call. */

#define _GNU_SOURCE
#include <stdint.h>

typedef void (*Sgemm)(int order, int trans_a, int trans_b, int64_t m, int64_t n, int64_t k, float alpha, const float *a,
                      int64_t lda, const float *b, int64_t ldb, float beta, float *c, int64_t ldc);

static Sgemm sgemm;
static int64_t calls;

int64_t ringattn_sgemm_calls(void) { return __atomic_load_n(&calls, __ATOMIC_RELAXED); }

#ifdef __linux__

#include <dlfcn.h>
#include <link.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static void redirected_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a,
                             int lda, const float *b, int ldb, float beta, float *c, int ldc) {
    __atomic_fetch_add(&calls, 1, __ATOMIC_RELAXED);
    sgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

/* The address of an entry of the dynamic section. glibc has added the base address already, musl has not. */
static const void *address(const struct dl_phdr_info *object, ElfW(Addr) value) {
    return (const void *)(value < object->dlpi_addr ? object->dlpi_addr + value : value);
}

/* The entry for cblas_sgemm among the relocations of one table; NULL if there is none. */
static void **find_in(const struct dl_phdr_info *object, const ElfW(Rela) * table, size_t bytes,
                      const ElfW(Sym) * symbols, const char *names) {
    for (size_t i = 0; table && i < bytes / sizeof *table; i++) {
        size_t symbol = sizeof(void *) == 8 ? table[i].r_info >> 32 : table[i].r_info >> 8;
        if (strcmp(names + symbols[symbol].st_name, "cblas_sgemm") == 0)
            return (void **)(object->dlpi_addr + table[i].r_offset);
    }
    return NULL;
}

static void **find_entry(const struct dl_phdr_info *object, const ElfW(Dyn) * dynamic) {
    const ElfW(Rela) *calls_table = NULL, *table = NULL;
    const ElfW(Sym) *symbols = NULL;
    const char *names = NULL;
    size_t calls_bytes = 0, bytes = 0;
    for (; dynamic->d_tag != DT_NULL; dynamic++) {
        switch (dynamic->d_tag) {
        case DT_JMPREL: calls_table = address(object, dynamic->d_un.d_ptr); break;
        case DT_PLTRELSZ: calls_bytes = dynamic->d_un.d_val; break;
        case DT_RELA: table = address(object, dynamic->d_un.d_ptr); break;
        case DT_RELASZ: bytes = dynamic->d_un.d_val; break;
        case DT_SYMTAB: symbols = address(object, dynamic->d_un.d_ptr); break;
        case DT_STRTAB: names = address(object, dynamic->d_un.d_ptr); break;
        case DT_PLTREL:
            if (dynamic->d_un.d_val != DT_RELA) return NULL; /* another format of relocations: 32-bit machines */
        }
    }
    if (!symbols || !names) return NULL;
    void **entry = find_in(object, calls_table, calls_bytes, symbols, names);
    return entry ? entry : find_in(object, table, bytes, symbols, names);
}

/* Whether a function belongs to MLX's wheel. A function that the user preloaded (LD_PRELOAD) is not replaced. */
static int belongs_to_mlx(void *function) {
    Dl_info info;
    return dladdr(function, &info) && info.dli_fname && strstr(info.dli_fname, "/mlx");
}

/* Write to an entry that the loader may have made read-only (full RELRO). */
static int put(void **entry, void *function, int read_only) {
    uintptr_t size = (uintptr_t)sysconf(_SC_PAGESIZE);
    void *page = (void *)((uintptr_t)entry & ~(size - 1));
    if (read_only && mprotect(page, size, PROT_READ | PROT_WRITE)) return 0;
    __atomic_store_n(entry, function, __ATOMIC_RELEASE);
    if (read_only) mprotect(page, size, PROT_READ);
    return 1;
}

static int visit(struct dl_phdr_info *object, size_t size, void *data) {
    (void)size;
    if (!object->dlpi_name || !strstr(object->dlpi_name, "/libmlx.so")) return 0;
    const ElfW(Phdr) *dynamic = NULL, *relro = NULL;
    for (int i = 0; i < object->dlpi_phnum; i++) {
        if (object->dlpi_phdr[i].p_type == PT_DYNAMIC) dynamic = &object->dlpi_phdr[i];
        if (object->dlpi_phdr[i].p_type == PT_GNU_RELRO) relro = &object->dlpi_phdr[i];
    }
    if (!dynamic) return 1;
    void **entry = find_entry(object, (const ElfW(Dyn) *)(object->dlpi_addr + dynamic->p_vaddr));
    if (!entry || !belongs_to_mlx(*entry)) return 1;
    ElfW(Addr) at = (ElfW(Addr))entry - object->dlpi_addr;
    int read_only = relro && at >= relro->p_vaddr && at < relro->p_vaddr + relro->p_memsz;
    *(int *)data = put(entry, (void *)redirected_sgemm, read_only);
    return 1;
}

#endif

/* Redirect the loaded MLX to `function`. Return 1 on success, else 0. */
int ringattn_redirect(void *function) {
    int done = 0;
    sgemm = (Sgemm)function;
#ifdef __linux__
    dl_iterate_phdr(visit, &done);
#endif
    return done;
}
