#pragma once
// report.html, compiled in by CMake; the mark /*REPORT*/ stands where the report's JSON goes.

namespace millrace::server {

extern const char* const kReportPage;

}  // namespace millrace::server
