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
}
