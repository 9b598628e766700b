"""Where each token sits when the chunked form works on it: rows of chunks of C slots, padded or packed.

A padded batch has one row per sequence and N = ceil(T / C) chunks. Packed sequences have one row; each begins on a
chunk of its own, so no chunk holds two of them and the wasted slots are fewer than C a sequence. Empty slots hold
zeros, which add nothing to any sum.

    grid = ChunkGrid(q, C, cu_seqlens)
    x = grid.load(q, 0, grid.num_chunks, torch.float32)      # [R, H, N, C, K]
"""

from __future__ import annotations

import torch
from torch import Tensor

from cottention.ops.validation import check_boundaries


class ChunkGrid:
    """The slots of one tensor's tokens; row r, chunk n, slot i.

    Attributes:
        num_chunks: N, chunks per row.
        chunk_size: C, slots per chunk.
        num_sequences: rows of a batch, or packed sequences.
        is_packed: whether `cu_seqlens` was given.
        max_chunks: chunks of the longest sequence.
    """

    def __init__(self, x: Tensor, chunk_size: int, cu_seqlens: Tensor | None) -> None:
        self.num_rows, self.num_tokens = x.shape[:2]
        self.chunk_size = chunk_size
        self.device = x.device
        self.is_packed = cu_seqlens is not None
        if cu_seqlens is None:
            self.num_sequences = self.num_rows
            self.num_chunks = self.max_chunks = -(-self.num_tokens // chunk_size)
            return
        boundaries = cu_seqlens.tolist()
        check_boundaries(boundaries, self.num_tokens)
        starts = torch.tensor(boundaries[:-1], dtype=torch.int64)
        ends = torch.tensor(boundaries[1:], dtype=torch.int64)
        chunks = (ends - starts + chunk_size - 1) // chunk_size  # [S] chunks of each sequence
        self.num_sequences = len(starts)
        self.num_chunks = int(chunks.sum())
        self.max_chunks = int(chunks.max()) if self.num_sequences else 0
        sequence = torch.repeat_interleave(chunks)  # [N] sequence of each chunk
        index = (
            torch.arange(self.num_chunks) - (chunks.cumsum(0) - chunks)[sequence]
        )  # [N] chunk's place in its sequence
        position = index[:, None] * chunk_size + torch.arange(chunk_size)  # [N, C] slot's place in its sequence
        token = starts[sequence][:, None] + position  # [N, C]
        filled = token < ends[sequence][:, None]
        self._lengths = (ends - starts).to(self.device)  # [S]
        self._sequence_of_chunk = sequence.tolist()
        self._sequence = sequence.to(self.device)
        self._filled = filled.flatten().to(self.device)  # [N C]
        self._token = torch.where(filled, token, 0).flatten().to(self.device)  # [N C]
        self._position = position.to(self.device)

    def load(self, x: Tensor, a: int, b: int, dtype: torch.dtype, real: Tensor | None = None) -> Tensor:
        """Chunks a to b of x `[B, T, H, D]` as a fresh `[R, H, b-a, C, D]`; 0 where empty or not in `real`."""
        H, D = x.shape[2:]
        if self.is_packed:
            slots = slice(a * self.chunk_size, b * self.chunk_size)
            tokens = x[0].index_select(0, self._token[slots])  # [G C, H, D]
            tokens = tokens.masked_fill_(~self._filled[slots, None, None], 0)
            chunks = torch.empty(1, H, tokens.shape[0], D, dtype=dtype, device=x.device)
            chunks[0].copy_(tokens.transpose(0, 1))
        else:
            first, last = a * self.chunk_size, min(b * self.chunk_size, self.num_tokens)
            chunks = torch.empty(self.num_rows, H, (b - a) * self.chunk_size, D, dtype=dtype, device=x.device)
            chunks[:, :, : last - first].copy_(x[:, first:last].transpose(1, 2))
            chunks[:, :, last - first :].zero_()
        chunks = chunks.view(chunks.shape[0], H, b - a, self.chunk_size, D)
        if real is not None:
            chunks.masked_fill_(~self.load_tokens(real, a, b)[:, None, :, :, None], 0)
        return chunks

    def load_tokens(self, x: Tensor, a: int, b: int) -> Tensor:
        """Chunks a to b of one number per token, `[B, T]`, as `[R, b-a, C]`; empty slots are 0."""
        return self.load(x[..., None, None], a, b, x.dtype)[:, 0, :, :, 0]

    def store(self, out: Tensor, chunks: Tensor, a: int, b: int) -> None:
        """Write chunks `[R, H, b-a, C, D]` to their tokens of out `[B, T, H, D]`, in out's dtype."""
        flat = chunks.flatten(2, 3).transpose(1, 2)  # [R, (b-a) C, H, D]
        if self.is_packed:
            slots = slice(a * self.chunk_size, b * self.chunk_size)
            filled = self._filled[slots]
            out[0].index_copy_(0, self._token[slots][filled], flat[0][filled].to(out.dtype))
        else:
            first, last = a * self.chunk_size, min(b * self.chunk_size, self.num_tokens)
            out[:, first:last].copy_(flat[:, : last - first])

    def counts(self, real: Tensor | None, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        """Real tokens up to each token `[B, T]` and in each whole sequence `[N]`, int64, continuing from `seen`."""
        if self.is_packed:
            offset = 0 if seen is None else seen[self._sequence][:, None]
            at_slot = self._position + 1 + offset  # [N, C]
            count = torch.zeros(1, self.num_tokens, dtype=torch.int64, device=self.device)
            count[0].index_copy_(0, self._token[self._filled], at_slot.flatten()[self._filled])
            return count, self._lengths if seen is None else self._lengths + seen
        if real is None:
            count = torch.arange(1, self.num_tokens + 1, device=self.device).expand(self.num_rows, -1)
        else:
            count = real.cumsum(-1)
        if seen is not None:
            count = count + seen[:, None]
        if self.num_tokens:
            return count, count[:, -1].clone()
        return count, torch.zeros_like(count[:, :1].sum(-1)) if seen is None else seen.clone()

    def total_at_each_token(self, total: Tensor) -> Tensor:
        """Each sequence's total `[N]` at each of its tokens, `[B, T]`."""
        if not self.is_packed:
            return total[:, None].expand(-1, self.num_tokens)
        at_slot = total[self._sequence][:, None].expand(-1, self.chunk_size).flatten()
        at_token = total.new_zeros(1, self.num_tokens)
        at_token[0].index_copy_(0, self._token[self._filled], at_slot[self._filled])
        return at_token

    def same_sequence(self, a: int, b: int, dtype: torch.dtype) -> Tensor:
        """`[b-a, b-a]` ones and zeros: which chunks of a..b belong to one sequence."""
        if not self.is_packed:
            return torch.ones(b - a, b - a, dtype=dtype, device=self.device)
        sequence = self._sequence[a:b]
        return (sequence[:, None] == sequence[None, :]).to(dtype)

    def spread(self, states: Tensor, a: int, b: int) -> Tensor:
        """Per-sequence states `[N, H, K, V]` beside each of the chunks a to b: broadcastable to `[R, H, b-a, K, V]`."""
        if not self.is_packed:
            return states[:, :, None]
        return states.index_select(0, self._sequence[a:b]).transpose(0, 1)[None]

    def gather(self, total: Tensor, chunk_states: Tensor, a: int, b: int) -> None:
        """Add the states of the chunks a to b, `[R, H, b-a, K, V]`, to their sequences in total `[N, H, K, V]`."""
        if not self.is_packed:
            total.add_(chunk_states.sum(2))
        else:
            total.index_add_(0, self._sequence[a:b], chunk_states[0].transpose(0, 1))

    def run_length(self, a: int, b: int, *, backward: bool) -> int:
        """How many chunks of a..b continue the sequence cut at a (forward) or b (backward); 0: nothing is cut."""
        if not self.is_packed:
            return b - a
        sequence = self._sequence_of_chunk
        if backward:
            if b == self.num_chunks or sequence[b] != sequence[b - 1]:
                return 0
            return sum(s == sequence[b] for s in sequence[a:b])
        if a == 0 or sequence[a] != sequence[a - 1]:
            return 0
        return sum(s == sequence[a] for s in sequence[a:b])

    def ends(self, a: int, b: int, *, backward: bool) -> tuple[list[int], list[int]]:
        """Chunks of a..b, counted from a, that end their sequence (backward: begin it), and those sequences."""
        step = -1 if backward else 1
        rim = -1 if backward else self.num_chunks
        found = [
            n for n in range(a, b) if n + step == rim or self._sequence_of_chunk[n + step] != self._sequence_of_chunk[n]
        ]
        return [n - a for n in found], [self._sequence_of_chunk[n] for n in found]
