// HCCL, as torch_npu calls it, and what streams and events mean for collectives. They are the only work of the simulated
// device that outlives its submission; Python does it, see moe_npu/sim/distributed.py.

#include <atomic>
#include <cstdint>
#include <type_traits>

#include "operators.h"

namespace {

constexpr int kSuccess = 0;

using Ask = int (*)(const char* function, const int64_t* values, int num_values);
std::atomic<Ask> ask_python{nullptr};
std::atomic<int64_t> unfinished{0};  // collectives under way; while there are none, events have no meaning

template <typename Value>
int64_t word(Value value) {
  if constexpr (std::is_pointer_v<Value>) {
    return reinterpret_cast<int64_t>(value);
  } else {
    return static_cast<int64_t>(value);
  }
}

template <typename... Values>
int ask(const char* function, Values... values) {
  const int64_t words[] = {0, word(values)...};
  const Ask callback = ask_python.load();
  if (callback == nullptr) moe_npu_sim_unimplemented(function);
  moe_npu_sim_require(callback(function, words + 1, sizeof...(values)));
  return kSuccess;
}

template <typename... Values>
int ask_if_busy(const char* function, Values... values) {
  return unfinished > 0 && ask_python.load() != nullptr ? ask(function, values...) : kSuccess;
}

struct Transfer {  // HcclSendRecvItem
  int is_receive;
  void* data;
  uint64_t count;
  int dtype;
  uint32_t peer;
};

}  // namespace

extern "C" {

void moe_npu_sim_connect_collectives(Ask callback) { ask_python = callback; }
void moe_npu_sim_add_unfinished(int64_t number) { unfinished += number; }

// ---- streams and events --------------------------------------------------------------------------------------------

int aclrtRecordEvent(void* event, void* stream) { return ask_if_busy("record_event", event, stream); }
int aclrtStreamWaitEvent(void*, void* event) { return ask_if_busy("wait_for_event", event); }
int moe_npu_sim_wait_for_event(void* event) { return ask_if_busy("wait_for_event", event); }
int moe_npu_sim_wait_for_stream(void* stream) { return ask_if_busy("wait_for_stream", stream); }
int moe_npu_sim_wait_for_all() { return ask_if_busy("wait_for_all"); }
bool moe_npu_sim_is_event_complete(void* event) {
  int64_t is_complete = 1;
  ask_if_busy("query_event", event, &is_complete);
  return is_complete != 0;
}
bool moe_npu_sim_is_stream_idle(void* stream) {
  int64_t is_idle = 1;
  ask_if_busy("query_stream", stream, &is_idle);
  return is_idle != 0;
}

// ---- communicators -------------------------------------------------------------------------------------------------

uint32_t HcclGetCommConfigCapability() { return 4; }  // buffer size, determinism, name, expansion mode
int HcclGetRootInfo(char* info) { return ask("root_info", info); }
int HcclCommInitRootInfo(uint32_t size, const char* info, uint32_t rank, void** comm) {
  return ask("init", size, info, rank, 0, comm);
}
int HcclCommInitRootInfoConfig(uint32_t size, const char* info, uint32_t rank, const char* config, void** comm) {
  constexpr int kName = 32;  // of HcclCommConfig
  return ask("init", size, info, rank, config + kName, comm);
}
int HcclCommDestroy(void* comm) {  // may come after Python's end
  return ask_python.load() != nullptr ? ask("destroy", comm) : kSuccess;
}
int HcclGetCommName(void* comm, char* name) { return ask("name", comm, name); }
int HcclGetCommAsyncError(void*, int* error) { return *error = kSuccess, kSuccess; }
const char* HcclGetErrorString(int) { return "a collective failed"; }

// ---- collectives ---------------------------------------------------------------------------------------------------

// a group of calls is one call to a device; here each is under way at once
int HcclGroupStart() { return kSuccess; }
int HcclGroupEnd() { return kSuccess; }
int HcclAllReduce(void* send, void* receive, uint64_t count, int dtype, int op, void* comm, void* stream) {
  return ask("all_reduce", comm, stream, send, receive, count, dtype, op);
}
int HcclReduce(void* send, void* receive, uint64_t count, int dtype, int op, uint32_t root, void* comm, void* stream) {
  return ask("reduce", comm, stream, send, receive, count, dtype, op, root);
}
int HcclBroadcast(void* data, uint64_t count, int dtype, uint32_t root, void* comm, void* stream) {
  return ask("broadcast", comm, stream, data, count, dtype, root);
}
int HcclAllGather(void* send, void* receive, uint64_t count, int dtype, void* comm, void* stream) {
  return ask("all_gather", comm, stream, send, receive, count, dtype);
}
int HcclAllGatherV(void* send, uint64_t count, void* receive, const void* counts, const void* offsets, int dtype,
                   void* comm, void* stream) {
  return ask("all_gather_v", comm, stream, send, count, receive, counts, offsets, dtype);
}
int HcclReduceScatter(void* send, void* receive, uint64_t count, int dtype, int op, void* comm, void* stream) {
  return ask("reduce_scatter", comm, stream, send, receive, count, dtype, op);
}
int HcclReduceScatterV(void* send, const void* counts, const void* offsets, void* receive, uint64_t count, int dtype,
                       int op, void* comm, void* stream) {
  return ask("reduce_scatter_v", comm, stream, send, counts, offsets, receive, count, dtype, op);
}
int HcclScatter(void* send, void* receive, uint64_t count, int dtype, uint32_t root, void* comm, void* stream) {
  return ask("scatter", comm, stream, send, receive, count, dtype, root);
}
int HcclAlltoAll(const void* send, uint64_t send_count, int send_dtype, const void* receive, uint64_t receive_count,
                 int receive_dtype, void* comm, void* stream) {
  return ask("all_to_all", comm, stream, send, send_count, send_dtype, receive, receive_count, receive_dtype);
}
int HcclAlltoAllV(const void* send, const void* send_counts, const void* send_offsets, int send_dtype,
                  const void* receive, const void* receive_counts, const void* receive_offsets, int receive_dtype,
                  void* comm, void* stream) {
  return ask("all_to_all_v", comm, stream, send, send_counts, send_offsets, send_dtype, receive, receive_counts,
             receive_offsets, receive_dtype);
}
int HcclAlltoAllVC(const void* send, const void* counts, int send_dtype, const void* receive, int receive_dtype,
                   void* comm, void* stream) {
  return ask("all_to_all_vc", comm, stream, send, counts, send_dtype, receive, receive_dtype);
}
int HcclBarrier(void* comm, void* stream) { return ask("barrier", comm, stream); }
int HcclSend(void* data, uint64_t count, int dtype, uint32_t peer, void* comm, void* stream) {
  return ask("send", comm, stream, data, count, dtype, peer);
}
int HcclRecv(void* data, uint64_t count, int dtype, uint32_t peer, void* comm, void* stream) {
  return ask("receive", comm, stream, data, count, dtype, peer);
}
int HcclBatchSendRecv(const Transfer* transfers, uint32_t number, void* comm, void* stream) {
  for (bool is_receive : {false, true}) {  // a receive may wait for what the peer sends after it
    for (uint32_t i = 0; i < number; i++) {
      const Transfer& one = transfers[i];
      if ((one.is_receive != 0) != is_receive) continue;
      ask(is_receive ? "receive" : "send", comm, stream, one.data, one.count, one.dtype, one.peer);
    }
  }
  return kSuccess;
}

}  // extern "C"
