#pragma once
// What an answer may be held to, as JSON text that travels with the request:
//
//   {"type":"json_object"}                        any JSON object
//   {"type":"json_schema","schema":{...}}         JSON that the schema accepts
//   {"type":"regex","pattern":"..."}              see ParseRegex
//   {"type":"choice","choices":["a","b"]}         one of these
//   {"type":"grammar","grammar":"root ::= ..."}   see AddGbnf
//   {"type":"any_of","of":[{...},{...}]}          one of these constraints
//   {"type":"tool_calls","tools":[{"name":"f","parameters":{...}}],"single":false}   calls, as Ling writes
//   them
//
// With "thinking":true beside the type, reasoning comes before: any text up to the first "</think>", and the
// constraint holds from there.

#include <string>
#include <string_view>

#include "base/json.h"
#include "base/status.h"
#include "engine/grammar/grammar.h"

namespace millrace::engine {

inline constexpr size_t kConstraintBytesMax = 256 << 10;

// The grammar of a constraint. InvalidArgument names what is wrong or not supported. Pure.
StatusOr<Grammar> BuildGrammar(std::string_view constraint);

// Adds what `schema` (draft 2020-12, the part that json_schema.cc lists) accepts to the grammar. Every text
// that matches is accepted by the schema; of the texts that are accepted, those with properties in another
// order, with undeclared properties, or with other white space do not match. InvalidArgument names the place
// and the keyword that is not supported.
StatusOr<ExpressionPtr> AddJsonSchema(const OrderedJson& schema, Grammar* grammar);

}  // namespace millrace::engine
