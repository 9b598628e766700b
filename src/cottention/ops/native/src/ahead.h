// Rows of the next chunk on their way to the cache while this one is computed.
//
// One head's tokens lie far apart, so no hardware prefetcher follows them, and reading them all at once would wait for
// memory. Every tile of a product asks for a few lines instead.
#pragma once

#include <cstdint>

namespace {

class Ahead {
  public:
    // Forget what was left, if anything.
    void clear() { num_ = at_ = 0; }

    // Ask for `rows` rows of `bytes` bytes, `stride` bytes apart; to be read, or to be written.
    void add(const void* data, int64_t stride, int64_t rows, int64_t bytes, bool to_write) {
        if (rows <= 0) return;
        parts_[num_++] = {static_cast<const char*>(data), stride, rows, bytes, to_write};
        if (num_ == 1) line_ = 0;
    }

    inline void some() {
        for (int i = 0; i < kLines && at_ < num_; i++) {
            Part& part = parts_[at_];
            if (part.to_write) {
                __builtin_prefetch(part.row + line_, 1, 2);
            } else {
                __builtin_prefetch(part.row + line_, 0, 2);
            }
            line_ += 64;
            if (line_ < part.bytes) continue;
            line_ = 0;
            part.row += part.stride;
            if (--part.rows == 0) at_++;
        }
    }

  private:
    static constexpr int kLines = 32;
    struct Part {
        const char* row;
        int64_t stride, rows, bytes;
        bool to_write;
    } parts_[8];
    int num_ = 0, at_ = 0;
    int64_t line_ = 0;
};

}  // namespace
