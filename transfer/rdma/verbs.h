#pragma once
// The door to RDMA hardware: what is used of libibverbs, as a table of function pointers. The library is
// opened at run time, so that a process starts on machines without it; tests put a fake table in its place.
//
// Semantics, ownership and error returns are libibverbs' own (ibv_* manual pages): pointers are null and ints
// are errno values or -1 with errno on failure.

#include <infiniband/verbs.h>

#include "base/status.h"

namespace millrace::transfer::rdma {

struct Verbs {
  ibv_device** (*get_device_list)(int* count);
  void (*free_device_list)(ibv_device** list);
  const char* (*get_device_name)(ibv_device* device);
  ibv_context* (*open_device)(ibv_device* device);
  int (*close_device)(ibv_context* context);
  int (*query_device)(ibv_context* context, ibv_device_attr* attributes);
  int (*query_port)(ibv_context* context, uint8_t port, ibv_port_attr* attributes);
  ssize_t (*query_gid_table)(ibv_context* context, ibv_gid_entry* entries, size_t entries_max);
  int (*get_async_event)(ibv_context* context,
                         ibv_async_event* event);  // blocks unless async_fd is non-blocking
  void (*ack_async_event)(ibv_async_event* event);

  ibv_pd* (*alloc_pd)(ibv_context* context);
  int (*dealloc_pd)(ibv_pd* pd);
  ibv_mr* (*reg_mr)(ibv_pd* pd, void* address, size_t bytes, int access);
  // Null where the library is older than dma-buf (rdma-core 34).
  ibv_mr* (*reg_dmabuf_mr)(ibv_pd* pd, uint64_t offset, size_t bytes, uint64_t iova, int fd, int access);
  int (*dereg_mr)(ibv_mr* mr);

  ibv_comp_channel* (*create_comp_channel)(ibv_context* context);
  int (*destroy_comp_channel)(ibv_comp_channel* channel);
  ibv_cq* (*create_cq)(ibv_context* context, int entries, void* cq_context, ibv_comp_channel* channel,
                       int vector);
  int (*destroy_cq)(ibv_cq* cq);
  int (*get_cq_event)(ibv_comp_channel* channel, ibv_cq** cq, void** cq_context);
  void (*ack_cq_events)(ibv_cq* cq, unsigned int count);
  int (*req_notify_cq)(ibv_cq* cq, int solicited_only);
  int (*poll_cq)(ibv_cq* cq, int entries, ibv_wc* completions);

  ibv_qp* (*create_qp)(ibv_pd* pd, ibv_qp_init_attr* attributes);
  int (*modify_qp)(ibv_qp* qp, ibv_qp_attr* attributes, int mask);
  int (*destroy_qp)(ibv_qp* qp);
  int (*post_send)(ibv_qp* qp, ibv_send_wr* request, ibv_send_wr** bad);
  int (*post_recv)(ibv_qp* qp, ibv_recv_wr* request, ibv_recv_wr** bad);
  const char* (*wc_status_str)(ibv_wc_status status);
};

// The machine's libibverbs, opened once and kept for the life of the process. Unavailable when there is none,
// or when it lacks a function. Any thread.
StatusOr<const Verbs*> SystemVerbs();
// What SystemVerbs gives from now on, in this process; null: the machine's again. For tests.
void ReplaceSystemVerbs(const Verbs* verbs);

}  // namespace millrace::transfer::rdma
