// The delta rule over whole sequences: heads of a task take turns, and backward starts each turn from a state that
// forward saved there.
#pragma once

#include "plan.h"

namespace {

class Erasing {
  public:
    explicit Erasing(const Plan& plan) : plan_(plan), call_(plan.call) {
        const int64_t wanted = call_.saved != 0 ? call_.saved_tokens : kTurn;
        turn_ = (wanted + plan_.chunk_ - 1) / plan_.chunk_ * plan_.chunk_;
        int64_t slots = 0;
        for (int64_t i = 0; i < plan_.num_pieces(); i++) {
            first_slot_.push_back(slots);
            slots += turns(plan_.piece(i));
        }
        num_slots_ = slots;
    }

    void forward() const {
        plan_.run(1, [&](int64_t, int64_t i, float* scratch) { forward(plan_.task(i), call_.saved, false, scratch); });
    }

    // dp: of each piece and head.
    void backward(std::vector<double>& dp) const {
        Floats own;
        int64_t saved = call_.saved;
        if (saved == 0) {
            own = floats(num_slots_ * call_.H * plan_.state_size());
            saved = reinterpret_cast<int64_t>(own.get());
        }
        plan_.run(1, [&](int64_t, int64_t i, float* scratch) {
            if (own) forward(plan_.task(i), saved, true, scratch);
            backward(plan_.task(i), saved, dp, scratch);
        });
    }

  private:
    int64_t turns(const Piece& piece) const {
        return piece.end > piece.start ? (piece.end - piece.start + turn_ - 1) / turn_ : 1;
    }

    // A head's state and what rounding took from it wait in scratch while other heads have their turn.
    float* waiting(const Task& task, int64_t head, float* scratch) const {
        return scratch + plan_.scratch_size() +
               (head - task.first_head) * (plan_.waiting_size() + plan_.lost_size());
    }

    Range range(const Task& task, int64_t head, int64_t turn, int64_t real_before, float* scratch) const {
        const Piece& piece = plan_.piece(task);
        const int64_t t0 = turn * turn_, t1 = t0 + turn_ < piece.end ? t0 + turn_ : piece.end;
        Range range = plan_.range(piece.sequence, head, t0, t1, real_before);
        range.lost = reinterpret_cast<uint16_t*>(waiting(task, head, scratch) + plan_.waiting_size());
        return range;
    }

    int64_t real(const Piece& piece, int64_t turn) const {
        const int64_t t0 = turn * turn_, t1 = t0 + turn_ < piece.end ? t0 + turn_ : piece.end;
        return Plan::count(plan_.mask_of(piece.sequence), t0, t1);
    }

    float* slot(int64_t saved, const Task& task, int64_t head, int64_t turn) const {
        return plan_.state_of(saved, first_slot_[size_t(task.piece)] + turn, head);
    }

    void forward(const Task& task, int64_t saved, bool states_alone, float* scratch) const {
        const Piece& piece = plan_.piece(task);
        const int64_t last = turns(piece) - 1;
        int64_t real_before = 0;
        for (int64_t i = 0; i <= last - (states_alone ? 1 : 0); i++) {
            for (int64_t head = task.first_head; head < task.last_head; head++) {
                float* own = waiting(task, head, scratch);
                Range r = range(task, head, i, real_before, scratch);
                r.continues = i > 0;
                const float* before = saved == 0 || i == 0 ? own : slot(saved, task, head, i - 1);
                float* after = saved == 0 ? own : slot(saved, task, head, i);
                r.state = i == 0 ? plan_.state_of(call_.kv, piece.sequence, head) : before;
                r.state_out = i == last ? plan_.state_of(call_.final_kv, piece.sequence, head) : after;
                plan_.kernels.erase_forward(r, scratch);
            }
            real_before += real(piece, i);
        }
    }

    void backward(const Task& task, int64_t saved, std::vector<double>& dp, float* scratch) const {
        const Piece& piece = plan_.piece(task);
        const int64_t last = turns(piece) - 1;
        int64_t real_before = Plan::count(plan_.mask_of(piece.sequence), 0, piece.end);
        for (int64_t i = last; i >= 0; i--) {
            real_before -= real(piece, i);
            for (int64_t head = task.first_head; head < task.last_head; head++) {
                float* own = waiting(task, head, scratch);
                Range r = range(task, head, i, real_before, scratch);
                r.continues = i < last;
                r.before = i == 0 ? plan_.state_of(call_.kv, piece.sequence, head) : slot(saved, task, head, i - 1);
                r.state = i == last ? plan_.state_of(call_.grad_final, piece.sequence, head) : own;
                r.state_out = i == 0 ? plan_.state_of(call_.dkv, piece.sequence, head) : own;
                r.dp = &dp[size_t(task.piece * call_.H + head)];
                plan_.kernels.erase_backward(r, scratch);
            }
        }
    }

    const Plan& plan_;
    const Call& call_;
    int64_t turn_ = 0, num_slots_ = 0;
    std::vector<int64_t> first_slot_;  // of each piece
};

}  // namespace
