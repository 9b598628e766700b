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
    }

    inline void some() {
        for (int64_t lines = kLines; lines > 0 && at_ < num_;) {
            Part& part = parts_[at_];
            lines = part.to_write ? ask<1>(part, lines) : ask<0>(part, lines);
            if (part.rows == 0) at_++;
        }
    }

  private:
    static constexpr int64_t kLines = 32, kLine = 64;
    struct Part {
        const char* row;
        int64_t stride, rows, bytes;
        bool to_write;
    } parts_[8];
    int num_ = 0, at_ = 0;

    // Whole rows, until `lines` are used up; returns what is left of them.
    template <int kToWrite>
    static inline int64_t ask(Part& part, int64_t lines) {
        for (; part.rows > 0 && lines > 0; part.rows--, part.row += part.stride)
            for (int64_t at = 0; at < part.bytes; at += kLine, lines--) __builtin_prefetch(part.row + at, kToWrite, 2);
        return lines;
    }
};

}  // namespace
