#pragma once
// How transfer-bench shows its results: a table for people, JSON for programs.

#include <string>

#include "base/json.h"
#include "server/cli/transfer_bench_run.h"

namespace millrace::server {

std::string BenchTableHead();
// One line for the row, one per rail, then errors, losses and faults if there were any.
std::string BenchTableRow(const BenchResult& result, bool one_process);
OrderedJson BenchJson(const BenchResult& result, bool one_process);
// "4KiB", "1MiB", "1000".
std::string SizeText(size_t bytes);
const char* OpName(BenchLoad::Op op);

}  // namespace millrace::server
