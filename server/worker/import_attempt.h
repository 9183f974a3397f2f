#pragma once
// D's side of one hand-off: one prompt, one P, one ticket.

#include <memory>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "server/worker/prefill_stream.h"
#include "server/worker/ticket.h"
#include "server/worker/worker_context.h"

namespace millrace::server {

struct AttemptTimes {
  TimePoint granted;      // the first pages were there
  TimePoint first_token;  // it arrived
  Duration post{};        // how long after that P still had writes to submit, as P says
  Duration wire{};        // how long P wrote in all, as P says
  TimePoint sealed;       // the seal arrived
  TimePoint committed;
  uint64_t bytes = 0;  // that were sealed
  uint32_t pieces = 0;
};

// Who asked for the import. Control thread.
class ImportOwner {
 public:
  virtual ~ImportOwner() = default;
  virtual void OnFirstToken(const engine::TokenEvent& first) = 0;
  // The sequence decodes in the engine from here on; the attempt needs no owner any more.
  virtual void OnImported(const AttemptTimes& times) = 0;
  // This P will not do it. The engine's import still exists; its ticket resolves by itself.
  virtual void OnAttemptFailed(const Status& status) = 0;
};

struct ImportParams {
  std::string address;       // of P
  engine::RequestId id = 0;  // of an import that has begun
  rpc::GenerateRequest request;
  TimePoint deadline = kNoDeadline;
};

// Control thread. Shared by its owner, its stream and the callbacks of engine and transfer: it lives until
// its ticket is released, long after an owner that gave up.
class ImportAttempt final : public PrefillStreamObserver, public std::enable_shared_from_this<ImportAttempt> {
 public:
  // `owner` outlives the attempt or abandons it.
  static std::shared_ptr<ImportAttempt> Start(WorkerContext* context, ImportOwner* owner,
                                              ImportParams params);
  ImportAttempt(WorkerContext* context, ImportOwner* owner, ImportParams params);

  // The owner has lost interest: no further call to it. The ticket closes, drains, is released.
  void Abandon();

  void OnEvent(const rpc::PrefillEvent& event) override;
  void OnStreamEnd(const Status& status) override;

 private:
  struct Grant {
    size_t first = 0;  // index in pages_
    size_t count = 0;
  };

  void OpenStream();
  void RequestGrants();
  void OnGrant(StatusOr<engine::GrantedPages> granted);
  void SendGrants();
  Status SendGrant(const Grant& grant);
  Status CheckFirstToken(const rpc::Token& token) const;
  Status CheckSeal(const rpc::PrefillEvent::Seal& seal) const;
  Status HandleEvent(const rpc::PrefillEvent& event);
  void CloseTicket();
  void OnClosed();
  void OnDigest(uint64_t digest);
  void Commit();
  void Fail(const Status& status);
  void Abort();
  void ReleaseWhenDrained();
  void Progress();
  void Watchdog();
  Duration PatienceNow() const;
  bool over() const {
    return ticket_.aborted() || ticket_.released() || ticket_.state() == TicketState::kCommitted;
  }

  WorkerContext* const context_;
  const ActiveGuard active_;
  ImportOwner* owner_;  // null after Abandon, failure or success
  const ImportParams params_;
  const int32_t num_pages_;    // of the whole sequence
  int32_t first_page_ = -1;    // those before it were cached here; -1 until the first grant
  const int32_t first_index_;  // number of the first token

  std::shared_ptr<PrefillStream> stream_;  // shared with gRPC, which calls it until it has ended
  bool accepted_ = false;
  uint64_t peer_epoch_ = 0;
  int32_t pages_requested_ = 0;        // index of the first page of the sequence that no grant was asked for
  std::vector<engine::PageId> pages_;  // granted by the engine, in sequence order from first_page_ on
  std::vector<Grant> grants_;          // answered by the engine
  size_t grants_requested_ = 0;
  size_t grants_sent_ = 0;
  size_t grants_used_ = 0;
  bool has_first_token_ = false;
  engine::SampledToken first_token_;
  std::vector<float> mtp_hidden_;  // that came with it
  uint64_t sealed_digest_ = 0;

  Ticket ticket_;
  transfer::TicketId ticket_id_ = 0;
  bool closing_ = false;
  bool closed_ = false;     // nothing under the ticket can touch memory any more
  bool digesting_ = false;  // the digest thread reads the pages

  TimePoint progress_at_;
  AttemptTimes times_;
};

}  // namespace millrace::server
