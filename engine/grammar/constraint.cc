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

// Any text up to the first end of thinking, that itself, and what ends its line. The tag's first character
// does not come in it again, so that a text which leaves the tag begins it anew or not at all.
ExpressionPtr Thinking() {
  constexpr std::string_view kEnd = "</think>";
  const auto other_than = [](std::vector<std::pair<uint32_t, uint32_t>> ranges) {
    return CodePoints(ComplementOf(std::move(ranges)));
  };
  std::vector<ExpressionPtr> anew;   // from behind its first character to there again
  std::vector<ExpressionPtr> leave;  // from there to other text
  for (size_t i = 1; i < kEnd.size(); ++i) {
    const ExpressionPtr so_far = Literal(kEnd.substr(1, i - 1));
    const auto next = static_cast<uint32_t>(kEnd[i]);
    anew.push_back(Sequence({so_far, Literal(kEnd.substr(0, 1))}));
    leave.push_back(Sequence({so_far, other_than({{kEnd[0], kEnd[0]}, {next, next}})}));
  }
  const ExpressionPtr begun = Sequence({Literal(kEnd.substr(0, 1)), Repeat(Choice(std::move(anew)), 0, -1)});
  const ExpressionPtr text =
      Choice({other_than({{kEnd[0], kEnd[0]}}), Sequence({begun, Choice(std::move(leave))})});
  return Sequence({Repeat(text, 0, -1), begun, Literal(kEnd.substr(1)), Repeat(Literal("\n"), 0, 2)});
}

// The expression of every kind but `any_of`, with the rules that it needs.
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
  if (type == "grammar") {
    MR_ASSIGN_OR_RETURN(const std::string source, Text(constraint, "grammar"));
    return AddGbnf(source, grammar);
  }
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
  Grammar grammar;
  grammar.Add(type, nullptr);
  auto root = type == "any_of" ? AnyOf(constraint, &grammar) : RootOf(constraint, &grammar);
  if (!root.ok()) return root.status();
  const auto thinking = constraint.find("thinking");
  if (thinking != constraint.end() && !thinking->is_boolean())
    return InvalidArgument("'thinking' must be true or false");
  const bool thinks = thinking != constraint.end() && thinking->get<bool>();
  grammar.rules[0].body = thinks ? Sequence({Thinking(), *std::move(root)}) : *std::move(root);
  return grammar;
}

}  // namespace millrace::engine
