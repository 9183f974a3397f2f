#include "transfer/rdma/verbs.h"

#include <dlfcn.h>

#include <atomic>

namespace millrace::transfer::rdma {
namespace {

// These are inline in libibverbs' header: calls through the device's own table.
int ReqNotifyCq(ibv_cq* cq, int solicited_only) { return ibv_req_notify_cq(cq, solicited_only); }
int PollCq(ibv_cq* cq, int entries, ibv_wc* completions) { return ibv_poll_cq(cq, entries, completions); }
int PostSend(ibv_qp* qp, ibv_send_wr* request, ibv_send_wr** bad) { return ibv_post_send(qp, request, bad); }
int PostRecv(ibv_qp* qp, ibv_recv_wr* request, ibv_recv_wr** bad) { return ibv_post_recv(qp, request, bad); }

// These take the caller's idea of the structure's size, or an older structure that the current one begins
// with.
ssize_t (*query_gid_table)(ibv_context*, ibv_gid_entry*, size_t, uint32_t flags, size_t entry_bytes);
ssize_t QueryGidTable(ibv_context* context, ibv_gid_entry* entries, size_t entries_max) {
  return query_gid_table(context, entries, entries_max, 0, sizeof(ibv_gid_entry));
}
int (*query_port)(ibv_context*, uint8_t, _compat_ibv_port_attr*);
int QueryPort(ibv_context* context, uint8_t port, ibv_port_attr* attributes) {
  *attributes = {};
  return query_port(context, port, reinterpret_cast<_compat_ibv_port_attr*>(attributes));
}

StatusOr<Verbs> Load() {
  void* const library = dlopen("libibverbs.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return Unavailable("no RDMA: {}", dlerror());
  const char* missing = nullptr;
  const auto load = [&]<typename F>(F** function, const char* name) {
    *function = reinterpret_cast<F*>(dlsym(library, name));
    if (*function == nullptr) missing = name;
  };
  Verbs verbs{};
  load(&verbs.get_device_list, "ibv_get_device_list");
  load(&verbs.free_device_list, "ibv_free_device_list");
  load(&verbs.get_device_name, "ibv_get_device_name");
  load(&verbs.open_device, "ibv_open_device");
  load(&verbs.close_device, "ibv_close_device");
  load(&verbs.query_device, "ibv_query_device");
  load(&query_port, "ibv_query_port");
  verbs.query_port = QueryPort;
  load(&query_gid_table, "_ibv_query_gid_table");
  verbs.query_gid_table = QueryGidTable;
  load(&verbs.get_async_event, "ibv_get_async_event");
  load(&verbs.ack_async_event, "ibv_ack_async_event");
  load(&verbs.alloc_pd, "ibv_alloc_pd");
  load(&verbs.dealloc_pd, "ibv_dealloc_pd");
  load(&verbs.reg_mr, "ibv_reg_mr");
  load(&verbs.dereg_mr, "ibv_dereg_mr");
  load(&verbs.create_comp_channel, "ibv_create_comp_channel");
  load(&verbs.destroy_comp_channel, "ibv_destroy_comp_channel");
  load(&verbs.create_cq, "ibv_create_cq");
  load(&verbs.destroy_cq, "ibv_destroy_cq");
  load(&verbs.get_cq_event, "ibv_get_cq_event");
  load(&verbs.ack_cq_events, "ibv_ack_cq_events");
  load(&verbs.create_qp, "ibv_create_qp");
  load(&verbs.modify_qp, "ibv_modify_qp");
  load(&verbs.destroy_qp, "ibv_destroy_qp");
  load(&verbs.wc_status_str, "ibv_wc_status_str");
  verbs.req_notify_cq = ReqNotifyCq;
  verbs.poll_cq = PollCq;
  verbs.post_send = PostSend;
  verbs.post_recv = PostRecv;
  if (missing != nullptr) return Unavailable("no RDMA: libibverbs.so.1 has no {}", missing);
  load(&verbs.reg_dmabuf_mr, "ibv_reg_dmabuf_mr");  // may stay null
  return verbs;
}

std::atomic<const Verbs*> replacement = nullptr;

}  // namespace

void ReplaceSystemVerbs(const Verbs* verbs) { replacement = verbs; }

StatusOr<const Verbs*> SystemVerbs() {
  if (const Verbs* const replaced = replacement) return replaced;
  static const StatusOr<Verbs> verbs = Load();
  if (!verbs.ok()) return verbs.status();
  return &*verbs;
}

}  // namespace millrace::transfer::rdma
