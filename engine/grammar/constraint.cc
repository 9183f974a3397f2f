#include "engine/grammar/constraint.h"

namespace millrace::engine {
namespace {

constexpr size_t kChoicesMax = 4096;

StatusOr<std::string> Text(const OrderedJson& constraint, const char* key) {
  const auto found = constraint.find(key);
  if (found == constraint.end() || !found->is_string()) return InvalidArgument("'{}' must be a string", key);
  return found->get<std::string>();
}

StatusOr<ExpressionPtr> ChoiceOf(const OrderedJson& constraint) {
  const auto found = constraint.find("choices");
  if (found == constraint.end() || !found->is_array() || found->empty() || found->size() > kChoicesMax)
    return InvalidArgument("'choice' must be a list of 1 to {} strings", kChoicesMax);
  std::vector<ExpressionPtr> choices;
  for (const OrderedJson& choice : *found) {
    if (!choice.is_string() || choice.get_ref<const std::string&>().empty())
      return InvalidArgument("every 'choice' must be a string that is not empty");
    choices.push_back(Literal(choice.get_ref<const std::string&>()));
  }
  return Choice(std::move(choices));
}

// The form that the chat template gives to calls, to the letter.
StatusOr<ExpressionPtr> ToolCalls(const OrderedJson& constraint, Grammar* grammar) {
  const auto tools = constraint.find("tools");
  if (tools == constraint.end() || !tools->is_array() || tools->empty())
    return InvalidArgument("'tools' must be a list with entries");
  std::vector<ExpressionPtr> calls;
  for (const OrderedJson& tool : *tools) {
    MR_ASSIGN_OR_RETURN(const std::string name, Text(tool, "name"));
    const auto parameters = tool.find("parameters");
    const OrderedJson schema = parameters != tool.end() && parameters->is_object() && !parameters->empty()
                                   ? *parameters
                                   : OrderedJson{{"type", "object"}};
    auto arguments = AddJsonSchema(schema, grammar);
    if (!arguments.ok())
      return Annotate(arguments.status(), fmt::format("the parameters of tool '{}'", name));
    calls.push_back(
        Sequence({Literal("<tool_call>\n{\"name\": " + DumpJson(OrderedJson(name)) + ", \"arguments\": "),
                  *arguments, Literal("}\n</tool_call>")}));
  }
  const ExpressionPtr call = RuleCall(grammar->Add("tool_call", Choice(std::move(calls))));
  const auto only_one = constraint.find("single");
  const bool single = only_one != constraint.end() && only_one->is_boolean() && only_one->get<bool>();
  return single ? call : Sequence({call, Repeat(Sequence({Literal("\n"), call}), 0, -1)});
}

// The expression of every kind but `grammar`, with the rules that it needs.
StatusOr<ExpressionPtr> RootOf(const OrderedJson& constraint, Grammar* grammar) {
  if (!constraint.is_object()) return InvalidArgument("the constraint must be an object");
  MR_ASSIGN_OR_RETURN(const std::string type, Text(constraint, "type"));
  if (type == "json_object") return AddJsonSchema(OrderedJson{{"type", "object"}}, grammar);
  if (type == "json_schema") {
    const auto schema = constraint.find("schema");
    if (schema == constraint.end()) return InvalidArgument("'schema' is missing");
    return AddJsonSchema(*schema, grammar);
  }
  if (type == "regex") {
    MR_ASSIGN_OR_RETURN(const std::string pattern, Text(constraint, "pattern"));
    return ParseRegex(pattern);
  }
  if (type == "choice") return ChoiceOf(constraint);
  if (type == "tool_calls") return ToolCalls(constraint, grammar);
  return InvalidArgument("a constraint of type '{}' is not known here", type);
}

StatusOr<ExpressionPtr> AnyOf(const OrderedJson& constraint, Grammar* grammar) {
  const auto of = constraint.find("of");
  if (of == constraint.end() || !of->is_array() || of->empty())
    return InvalidArgument("'of' must be a list with entries");
  std::vector<ExpressionPtr> parts;
  for (const OrderedJson& part : *of) {
    MR_ASSIGN_OR_RETURN(ExpressionPtr root, RootOf(part, grammar));
    parts.push_back(std::move(root));
  }
  return Choice(std::move(parts));
}

}  // namespace

StatusOr<Grammar> BuildGrammar(std::string_view text) {
  if (text.size() > kConstraintBytesMax)
    return InvalidArgument("the constraint has {} bytes; at most {} are taken", text.size(),
                           kConstraintBytesMax);
  MR_ASSIGN_OR_RETURN(const OrderedJson constraint, ParseOrderedJson(text));
  if (!constraint.is_object()) return InvalidArgument("the constraint must be an object");
  MR_ASSIGN_OR_RETURN(const std::string type, Text(constraint, "type"));
  if (type == "grammar") {
    MR_ASSIGN_OR_RETURN(const std::string source, Text(constraint, "grammar"));
    return ParseGbnf(source);
  }
  Grammar grammar;
  grammar.Add(type, nullptr);
  auto root = type == "any_of" ? AnyOf(constraint, &grammar) : RootOf(constraint, &grammar);
  if (!root.ok()) return root.status();
  grammar.rules[0].body = *std::move(root);
  return grammar;
}

}  // namespace millrace::engine
