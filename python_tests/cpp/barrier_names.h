// Barriers by name, for host_cuda.cpp: in messages, to be listed, to be left out.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "fiber.h"
#include "host_cuda.h"

namespace host_cuda {

// file:line of a barrier < file:line of where the function with it was inlined, so that a barrier
// in a helper has one name for each of the helper's uses. Only a sanitizer knows it.
inline std::string name_of(const void* caller, int max_frames = 2) {
  char buffer[4096] = "", unknown[32];
  std::snprintf(unknown, sizeof(unknown), "%p", caller);
  if (!__sanitizer_symbolize_pc) return unknown;
  __sanitizer_symbolize_pc(const_cast<void*>(caller), "%s:%l", buffer, sizeof(buffer));
  std::string name;
  int frames = 0;
  for (const char* p = buffer; *p && frames < max_frames; p += std::strlen(p) + 1) {
    const char* slash = std::strrchr(p, '/');
    const char* frame = slash ? slash + 1 : p;
    if (std::strncmp(frame, "host_cuda.h:", 12) == 0) continue;
    if (frames++ > 0) name += '<';
    name += frame;
  }
  return frames ? name : unknown;
}

// True if two callers are one line of the sources, of which the compiler may have made copies.
inline bool same_line(const void* caller, const void* other) {
  return caller == other || !__sanitizer_symbolize_pc || name_of(caller, 1) == name_of(other, 1);
}

// The barriers and fences that were passed.
class Watch {
 public:
  Watch() {
    if (list_) std::atexit([] { watch().print(); });
  }
  static Watch& watch() {
    static Watch* watch = new Watch;  // lives on while the program exits
    return *watch;
  }

  bool dropped(const void* caller) {
    if (!list_ && !drop_) return false;
    // A fixed table: memory allocated by one fiber and freed by another looks like a race.
    Site* site = &sites_[reinterpret_cast<uintptr_t>(caller) % kSites];
    for (size_t tried = 0; site->caller != caller; ++tried) {
      if (!site->caller) *site = {caller, 0, drop_ && name_of(caller) == drop_};
      if (site->caller == caller) break;
      if (tried == kSites) fail("too many barriers to watch");
      site = site == sites_ + kSites - 1 ? sites_ : site + 1;
    }
    ++site->count;
    return site->dropped;
  }

 private:
  static constexpr size_t kSites = 8191;
  struct Site {
    const void* caller;
    uint64_t count;
    bool dropped;
  };
  const bool list_ = std::getenv("EFLAT_HOST_CUDA_LIST_BARRIERS");
  const char* const drop_ = std::getenv("EFLAT_HOST_CUDA_DROP_BARRIER");
  Site sites_[kSites] = {};

  void print() const {
    std::map<std::string, uint64_t> counts;
    for (const Site& site : sites_)
      if (site.caller) counts[name_of(site.caller)] += site.count;
    for (const auto& [name, count] : counts)
      std::printf("barrier %s %llu\n", name.c_str(), static_cast<unsigned long long>(count));
  }
};

}  // namespace host_cuda
