// An allocator for large tensors: what one training step frees, the next one is given again.
//
// PyTorch asks the C library for aligned memory. glibc cuts that from a longer piece, and the ends that it
// puts back go to whoever asks for a few bytes next: then the hole that a tensor leaves is too short for the
// next tensor of the same size, and the heap grows to about twice of what is ever in use. Here large tensors
// share one range of addresses with nothing else. Each takes the smallest free block that holds it; free
// neighbours are one block. The range is backed by huge pages where the system has them.

#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <iterator>
#include <limits>
#include <map>
#include <mutex>
#include <unordered_map>

namespace {

constexpr size_t kLarge = size_t{1} << 20;  // smaller tensors are the C library's
constexpr size_t kLine = 64;                // of the caches: tensors begin at its multiples
constexpr size_t kGap = 67 * kLine;         // behind each tensor
constexpr size_t kLeast = size_t{1} << 16;  // what is left of a block and shorter stays a part of it
constexpr size_t kHugePage = size_t{1} << 21;
constexpr size_t kGrowth = size_t{1} << 26;
constexpr size_t kLeastRange = size_t{1} << 30;

size_t rounded_up(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

// A free block. Of two of one size the one that was freed last comes first: the caches may hold it still.
struct Free {
  size_t size;
  int64_t age;  // falls from one block to the next
  bool operator<(const Free& other) const {
    return size != other.size ? size < other.size : age < other.age;
  }
};

class Range {
 public:
  // Reserves addresses, which take no memory; false where the system gives none.
  bool reserve() {
    const auto memory = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGE_SIZE);
    for (size_t size = 4 * rounded_up(memory, kGrowth); size >= kLeastRange; size /= 2) {
      void* found = mmap(nullptr, size + kHugePage, PROT_NONE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (found == MAP_FAILED) continue;
      begin_ = end_ = reinterpret_cast<char*>(
          rounded_up(reinterpret_cast<uintptr_t>(found), kHugePage));
      limit_ = begin_ + size / kHugePage * kHugePage;
      madvise(begin_, limit_ - begin_, MADV_HUGEPAGE);  // where there are none, it does no harm
      return true;
    }
    return false;
  }

  // Null where no addresses or no memory are left.
  void* allocate(size_t bytes) {
    // Tensors of one size would else begin at the same place of every page, and what a kernel reads of
    // several of them would compete for the same lines of the caches.
    const size_t size = rounded_up(bytes, kLine) + kGap;
    const std::lock_guard<std::mutex> guard(mutex_);
    auto found = smallest_of(size);
    if (found == free_by_size_.end()) {
      if (!grow(size)) return nullptr;
      found = smallest_of(size);
    }
    char* const block = found->second;
    const size_t available = remove_free(block);
    const size_t taken = available - size < kLeast ? available : size;
    if (taken < available) add_free(block + taken, available - taken);
    used_.emplace(block, taken);
    return block;
  }

  bool holds(const void* pointer) const { return pointer >= begin_ && pointer < limit_; }

  void release(void* pointer) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = used_.find(static_cast<char*>(pointer));
    const auto [block, size] = *found;
    used_.erase(found);
    add_free(block, size);
  }

  // Gives the memory of all free blocks to the system; their addresses stay.
  void hand_back() {
    const size_t page = sysconf(_SC_PAGE_SIZE);
    const std::lock_guard<std::mutex> guard(mutex_);
    for (const auto& [block, free] : free_by_address_) {
      const size_t skipped = rounded_up(reinterpret_cast<uintptr_t>(block), page) -
                             reinterpret_cast<uintptr_t>(block);
      if (free.size < skipped + page) continue;
      madvise(block + skipped, (free.size - skipped) / page * page, MADV_DONTNEED);
    }
  }

  std::mutex& mutex() { return mutex_; }

 private:
  // Makes the free block at the end at least `size` long.
  bool grow(size_t size) {
    size_t missing = size;
    if (!free_by_address_.empty()) {
      const auto& [block, last] = *free_by_address_.rbegin();
      if (block + last.size == end_) missing -= last.size;
    }
    missing = rounded_up(missing, kGrowth);
    if (missing > static_cast<size_t>(limit_ - end_)) return false;
    if (mprotect(end_, missing, PROT_READ | PROT_WRITE) != 0) return false;
    end_ += missing;
    add_free(end_ - missing, missing);
    return true;
  }

  void add_free(char* block, size_t size) {
    auto next = free_by_address_.lower_bound(block);
    if (next != free_by_address_.begin()) {
      const auto& [previous, free] = *std::prev(next);
      if (previous + free.size == block) {
        block = previous;
        size += remove_free(previous);
      }
    }
    if (next != free_by_address_.end() && next->first == block + size) {
      size += remove_free(next->first);
    }
    const Free free{size, --age_};
    free_by_address_.emplace(block, free);
    free_by_size_.emplace(free, block);
  }

  // Returns its size.
  size_t remove_free(char* block) {
    const auto found = free_by_address_.find(block);
    const Free free = found->second;
    free_by_address_.erase(found);
    free_by_size_.erase(free);
    return free.size;
  }

  std::map<Free, char*>::iterator smallest_of(size_t size) {
    return free_by_size_.lower_bound({size, std::numeric_limits<int64_t>::min()});
  }

  char* begin_ = nullptr;
  char* end_ = nullptr;    // of what may be read and written
  char* limit_ = nullptr;  // of what is reserved
  std::mutex mutex_;
  int64_t age_ = 0;
  std::map<char*, Free> free_by_address_;
  std::map<Free, char*> free_by_size_;
  std::unordered_map<char*, size_t> used_;
};

// Never destroyed: tensors may be freed until the very end of the process.
Range& range() {
  static Range* const only = new Range;
  return *only;
}

void release(void* pointer) {
  if (!range().holds(pointer)) {
    c10::GetDefaultCPUAllocator()->raw_deleter()(pointer);
    return;
  }
  c10::profiledCPUMemoryReporter().Delete(pointer);
  range().release(pointer);
}

class LargeTensorAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* block = bytes < kLarge ? nullptr : range().allocate(bytes);
    if (block == nullptr) return c10::GetDefaultCPUAllocator()->allocate(bytes);
    c10::profiledCPUMemoryReporter().New(block, bytes);
    return {block, block, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

}  // namespace

// Serve large tensors from now on; false where no range of addresses can be had.
extern "C" bool serve_large_tensors() {
  if (!range().reserve()) return false;
  pthread_atfork([] { range().mutex().lock(); }, [] { range().mutex().unlock(); },
                 [] { range().mutex().unlock(); });
  c10::SetCPUAllocator(new LargeTensorAllocator);
  return true;
}

// To be called after serve_large_tensors() has returned true.
extern "C" void hand_back_large_tensors() { range().hand_back(); }
