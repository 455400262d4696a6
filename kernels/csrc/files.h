// Bytes of open files by their place, so that several threads may move some at a time. A file is what the system calls one: a descriptor,
// or a HANDLE of Windows.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>

#if defined(_WIN32)
#define NOMINMAX
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <unistd.h>
#endif

namespace fastmaf {

// Both return how many bytes they moved, 0 behind the end of a file, or the negative of an errno.
#if defined(_WIN32)
template <class Call, class Memory>
int64_t moved_by(const Call& call, int64_t file, Memory memory, std::size_t bytes, int64_t place) {
  OVERLAPPED at{};
  at.Offset = static_cast<DWORD>(place);
  at.OffsetHigh = static_cast<DWORD>(place >> 32);
  DWORD moved = 0;
  if (call(reinterpret_cast<HANDLE>(file), memory, static_cast<DWORD>(bytes), &moved, &at)) return moved;
  const DWORD error = GetLastError();
  return error == ERROR_HANDLE_EOF ? 0 : error == ERROR_DISK_FULL ? -ENOSPC : -EIO;
}
inline int64_t read_at(int64_t file, char* to, std::size_t bytes, int64_t place) { return moved_by(ReadFile, file, to, bytes, place); }
inline int64_t write_at(int64_t file, const char* from, std::size_t bytes, int64_t place) {
  return moved_by(WriteFile, file, from, bytes, place);
}
#else
inline int64_t read_at(int64_t file, char* to, std::size_t bytes, int64_t place) {
  const int64_t moved = pread(static_cast<int>(file), to, bytes, place);
  return moved < 0 ? -errno : moved;
}
inline int64_t write_at(int64_t file, const char* from, std::size_t bytes, int64_t place) {
  const int64_t moved = pwrite(static_cast<int>(file), from, bytes, place);
  return moved < 0 ? -errno : moved;
}
#endif

}  // namespace fastmaf
