// What the generated entry points of operators and the runtime share.
#pragma once

#include <cstdint>

// one argument of an operator
union Slot {
  void* pointer;
  int64_t integer;
  double real;
};

// signature: a letter per argument; see moe_npu/sim/kernels/table.py
struct Operator {
  int id;
  const char* name;
  const char* signature;
};

extern "C" {
int moe_npu_sim_prepare(const Operator* op, const Slot* slots, uint64_t* workspace_size, void** executor);
int moe_npu_sim_launch(void* executor);
const Operator* moe_npu_sim_find(const char* name);  // null if the table of kernels lacks it
void moe_npu_sim_unimplemented(const char* what);
void moe_npu_sim_require(int outcome);  // raises what Python answered, with its message

// collectives that are under way; see collectives.cpp
int moe_npu_sim_wait_for_event(void* event);
int moe_npu_sim_wait_for_stream(void* stream);
int moe_npu_sim_wait_for_all();
bool moe_npu_sim_is_event_complete(void* event);
bool moe_npu_sim_is_stream_idle(void* stream);
}
