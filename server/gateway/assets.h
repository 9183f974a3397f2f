#pragma once
// Files of assets/ inside the program; assets.cc is made from them when the program is built.

#include <string_view>

namespace millrace::server {

extern const std::string_view kIndexHtml;
extern const std::string_view kOpenapiJson;

}  // namespace millrace::server
