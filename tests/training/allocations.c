// Counts the bytes that a process has asked malloc for and not given back, and the most that they ever were. Preloaded, it
// takes malloc's place: it sees torch's allocator, the kernels' own buffers, libraries and Python alike.
#include <errno.h>
#include <malloc.h>
#include <pthread.h>
#include <stddef.h>

void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void __libc_free(void*);

// What malloc_usable_size says of large aligned memory includes what was skipped to align it, and never touched: for those the
// size that was asked for is written down.
enum { kPlaces = 4096, kLarge = 1 << 20 };
static struct {
  void* at;
  long size;
} large[kPlaces];
static long held, most;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void* count(void* p, size_t asked) {
  if (p == NULL) return NULL;
  long size = (long)malloc_usable_size(p);
  pthread_mutex_lock(&lock);
  for (int i = 0; size >= kLarge && i < kPlaces; ++i)
    if (large[i].at == NULL) {
      large[i].at = p;
      size = large[i].size = (long)asked;
      break;
    }
  held += size;
  if (held > most) most = held;
  pthread_mutex_unlock(&lock);
  return p;
}

static void discount(void* p) {
  if (p == NULL) return;
  long size = (long)malloc_usable_size(p);
  pthread_mutex_lock(&lock);
  for (int i = 0; size >= kLarge && i < kPlaces; ++i)
    if (large[i].at == p) {
      large[i].at = NULL;
      size = large[i].size;
      break;
    }
  held -= size;
  pthread_mutex_unlock(&lock);
}

void* malloc(size_t n) { return count(__libc_malloc(n), n); }
void* calloc(size_t n, size_t size) { return count(__libc_calloc(n, size), n * size); }
void* memalign(size_t alignment, size_t n) { return count(__libc_memalign(alignment, n), n); }
void* aligned_alloc(size_t alignment, size_t n) { return memalign(alignment, n); }
int posix_memalign(void** p, size_t alignment, size_t n) {
  void* found = memalign(alignment, n);
  if (found == NULL) return ENOMEM;
  *p = found;
  return 0;
}
void free(void* p) {
  discount(p);
  __libc_free(p);
}
void* realloc(void* p, size_t n) {
  discount(p);
  void* found = __libc_realloc(p, n);
  if (found == NULL && n != 0) return count(p, malloc_usable_size(p)), NULL;  // p is as it was
  return count(found, n);
}

long bytes_held(void) { return held; }
long most_bytes_held(void) { return most; }
void forget_most(void) { most = held; }
