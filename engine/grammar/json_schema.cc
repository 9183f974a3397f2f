// JSON schemas into grammar rules. What is not listed here is refused by name: a constraint that is half kept
// would be worse than none.

#include <algorithm>
#include <map>
#include <set>

#include "engine/grammar/constraint.h"

namespace millrace::engine {
namespace {

constexpr int kDepthMax = 64;
constexpr size_t kRulesMax = 4096;
constexpr int32_t kLengthMax = 4096;

// They describe; they do not constrain.
const std::set<std::string> kAnnotations = {"title",   "description", "default",     "examples", "$schema",
                                            "$id",     "$comment",    "deprecated",  "readOnly", "writeOnly",
                                            "example", "$defs",       "definitions", "strict"};

const std::map<std::string, std::set<std::string>> kKeywords = {
    {"object", {"properties", "required", "additionalProperties"}},
    {"array", {"items", "minItems", "maxItems"}},
    {"string", {"minLength", "maxLength", "pattern", "format"}},
    {"integer", {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}},
    {"number", {}},
    {"boolean", {}},
    {"null", {}},
};

// Years from 1 on: most libraries have no year 0. February has 28 days: a regular expression of leap years is
// long.
const std::string kDate =
    R"((\d{3}[1-9]|\d{2}[1-9]\d|\d[1-9]\d{2}|[1-9]\d{3})-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|)"
    R"((0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8])))";
const std::string kTime = R"(([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d))";
const std::map<std::string, std::string> kFormats = {
    {"date", kDate},
    {"time", kTime},
    {"date-time", kDate + "T" + kTime},
    {"uuid", R"([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})"},
    {"ipv4", R"(((25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)\.){3}(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d))"},
    {"email",
     R"([a-z0-9]{1,32}([._+-][a-z0-9]{1,32}){0,4}@[a-z0-9]{1,32}(\.[a-z0-9]{1,32}){0,4}\.[a-z]{2,8})"},
};

bool OfType(const OrderedJson& value, const std::string& type) {
  if (type == "object") return value.is_object();
  if (type == "array") return value.is_array();
  if (type == "string") return value.is_string();
  if (type == "integer") return value.is_number_integer();
  if (type == "number") return value.is_number();
  if (type == "boolean") return value.is_boolean();
  return type == "null" && value.is_null();
}

// How characters of a pattern are written inside a JSON string: '"', '\' and controls are escaped.
ExpressionPtr EscapedForJson(const ExpressionPtr& expression) {
  Expression copy = *expression;
  for (ExpressionPtr& part : copy.parts) part = EscapedForJson(part);
  if (copy.kind != Expression::Kind::kBytes) return std::make_shared<const Expression>(std::move(copy));
  std::vector<ExpressionPtr> parts;
  Expression plain{.kind = Expression::Kind::kBytes};
  for (const auto& [first, last] : copy.ranges) {
    for (int byte = first; byte <= last; ++byte) {
      const auto b = static_cast<uint8_t>(byte);
      if (b >= 0x20 && b != '"' && b != '\\') {
        if (!plain.ranges.empty() && plain.ranges.back().second + 1 == b) {
          plain.ranges.back().second = b;
        } else {
          plain.ranges.emplace_back(b, b);
        }
      } else {
        const std::string dumped = DumpJson(OrderedJson(std::string(1, static_cast<char>(b))));
        parts.push_back(Literal(std::string_view(dumped).substr(1, dumped.size() - 2)));
      }
    }
  }
  if (!plain.ranges.empty()) parts.push_back(std::make_shared<const Expression>(std::move(plain)));
  return Choice(std::move(parts));
}

ExpressionPtr Digits(size_t count) {
  return Repeat(ByteRange('0', '9'), static_cast<int32_t>(count), static_cast<int32_t>(count));
}

// Decimal numbers of one length from `low` to `high`.
ExpressionPtr SameLength(std::string_view low, std::string_view high) {
  if (low.find_first_not_of('0') == std::string_view::npos &&
      high.find_first_not_of('9') == std::string_view::npos) {
    return Digits(low.size());  // also what keeps the number of parts linear in the length
  }
  const auto a = static_cast<uint8_t>(low[0]);
  const auto b = static_cast<uint8_t>(high[0]);
  const size_t rest = low.size() - 1;
  if (a == b) return Sequence({ByteRange(a, a), SameLength(low.substr(1), high.substr(1))});
  std::vector<ExpressionPtr> parts = {
      Sequence({ByteRange(a, a), SameLength(low.substr(1), std::string(rest, '9'))}),
      Sequence({ByteRange(b, b), SameLength(std::string(rest, '0'), high.substr(1))})};
  if (b - a > 1) parts.push_back(Sequence({ByteRange(a + 1, b - 1), Digits(rest)}));
  return Choice(std::move(parts));
}

// Whole numbers from `low` to `high`, both at least 0.
ExpressionPtr Natural(int64_t low, int64_t high) {
  std::vector<ExpressionPtr> parts;
  const std::string last = std::to_string(high);
  for (std::string from = std::to_string(low); from.size() <= last.size();) {
    const std::string to = from.size() == last.size() ? last : std::string(from.size(), '9');
    parts.push_back(SameLength(from, to));
    from = "1" + std::string(from.size(), '0');
  }
  return Choice(std::move(parts));
}

class SchemaBuilder {
 public:
  SchemaBuilder(const OrderedJson& root, Grammar* grammar) : root_(root), grammar_(*grammar) {}

  StatusOr<ExpressionPtr> Build(const OrderedJson& schema, const std::string& path, int depth);

 private:
  template <typename... Args>
  static Status Refuse(const std::string& path, fmt::format_string<Args...> format, Args&&... args) {
    return InvalidArgument("schema at '{}': {}", path, fmt::format(format, std::forward<Args>(args)...));
  }

  StatusOr<ExpressionPtr> BuildReference(const OrderedJson& schema, const std::string& path, int depth);
  StatusOr<ExpressionPtr> BuildValues(const OrderedJson& schema, const std::string& path);
  StatusOr<ExpressionPtr> BuildAlternatives(const OrderedJson& schema, const char* key,
                                            const std::string& path, int depth);
  StatusOr<ExpressionPtr> BuildType(const std::string& type, const OrderedJson& schema,
                                    const std::string& path, int depth);
  StatusOr<ExpressionPtr> BuildObject(const OrderedJson& schema, const std::string& path, int depth);
  StatusOr<ExpressionPtr> BuildArray(const OrderedJson& schema, const std::string& path, int depth);
  StatusOr<ExpressionPtr> BuildString(const OrderedJson& schema, const std::string& path);
  StatusOr<ExpressionPtr> BuildInteger(const OrderedJson& schema, const std::string& path);
  StatusOr<int32_t> Count(const OrderedJson& schema, const char* key, int32_t absent,
                          const std::string& path);
  Status CheckTellApart(const OrderedJson& alternatives, const std::string& path) const;
  Status CheckOnly(const OrderedJson& schema, const std::set<std::string>& allowed,
                   const std::string& path) const;

  ExpressionPtr AsRule(const std::string& name, ExpressionPtr body) {
    return RuleCall(grammar_.Add(name, std::move(body)));
  }
  // Rules that every schema may use are made at their first use.
  ExpressionPtr Shared(const std::string& name, ExpressionPtr (SchemaBuilder::*make)()) {
    const auto found = shared_.find(name);
    if (found != shared_.end()) return RuleCall(found->second);
    const int32_t rule = grammar_.Add(name, nullptr);
    shared_[name] = rule;
    ExpressionPtr body = (this->*make)();
    grammar_.rules[static_cast<size_t>(rule)].body = std::move(body);
    return RuleCall(rule);
  }
  // What large schemas repeat is one rule, known by `key`: fewer states, and the masks that were found in one
  // place serve in all.
  ExpressionPtr Once(const std::string& key, const ExpressionPtr& body) {
    const auto [found, added] = shared_.try_emplace(key, 0);
    if (added) found->second = grammar_.Add(key, body);
    return RuleCall(found->second);
  }
  // Between tokens: nothing, a space, or a new line and its indentation. Without a limit models get lost in
  // it.
  ExpressionPtr MakeSpace() {
    return Optional(Choice({Literal(" "), Sequence({Literal("\n"), Repeat(Literal(" "), 0, 24)})}));
  }
  ExpressionPtr Space() { return Shared("space", &SchemaBuilder::MakeSpace); }
  ExpressionPtr MakeCharacter() {
    const ExpressionPtr hex = Choice({ByteRange('0', '9'), ByteRange('a', 'f'), ByteRange('A', 'F')});
    const ExpressionPtr not_d = Choice({ByteRange('0', '9'), ByteRange('a', 'c'), ByteRange('e', 'f'),
                                        ByteRange('A', 'C'), ByteRange('E', 'F')});
    const ExpressionPtr d = Choice({Literal("d"), Literal("D")});
    std::vector<ExpressionPtr> escapes;
    for (const char* c : {"\"", "\\", "/", "b", "f", "n", "r", "t"}) escapes.push_back(Literal(c));
    escapes.push_back(Sequence({Literal("u"), not_d, hex, hex, hex}));
    escapes.push_back(Sequence({Literal("u"), d, ByteRange('0', '7'), hex, hex}));  // no surrogates
    return Choice({CodePoints(ComplementOf({{0, 0x1F}, {'"', '"'}, {'\\', '\\'}})),
                   Sequence({Literal("\\"), Choice(std::move(escapes))})});
  }
  ExpressionPtr MakeString() {
    return Sequence({Literal("\""), Repeat(MakeCharacter(), 0, -1), Literal("\"")});
  }
  ExpressionPtr String() { return Shared("string", &SchemaBuilder::MakeString); }
  ExpressionPtr MakeInteger() {
    return Sequence(
        {Optional(Literal("-")),
         Choice({Literal("0"), Sequence({ByteRange('1', '9'), Repeat(ByteRange('0', '9'), 0, 14)})})});
  }
  ExpressionPtr Integer() { return Shared("integer", &SchemaBuilder::MakeInteger); }
  ExpressionPtr MakeNumber() {
    const ExpressionPtr exponent =
        Sequence({Choice({Literal("e"), Literal("E")}), Optional(Choice({Literal("+"), Literal("-")})),
                  Repeat(ByteRange('0', '9'), 1, 2)});
    return Sequence({MakeInteger(), Optional(Sequence({Literal("."), Repeat(ByteRange('0', '9'), 1, 15)})),
                     Optional(exponent)});
  }
  ExpressionPtr Number() { return Shared("number", &SchemaBuilder::MakeNumber); }
  ExpressionPtr MakeValue() {
    return Choice({ObjectOf(Value()), ArrayOf(Value(), 0, -1), String(), Number(), Literal("true"),
                   Literal("false"), Literal("null")});
  }
  ExpressionPtr Value() { return Shared("value", &SchemaBuilder::MakeValue); }
  ExpressionPtr Comma() { return Sequence({Literal(","), Space()}); }
  ExpressionPtr Colon() { return Sequence({Literal(":"), Space()}); }
  ExpressionPtr ObjectOf(const ExpressionPtr& value) {
    const ExpressionPtr pair = AsRule("pair", Sequence({String(), Colon(), value}));
    return Sequence({Literal("{"), Space(),
                     Optional(Sequence({pair, Repeat(Sequence({Comma(), pair}), 0, -1), Space()})),
                     Literal("}")});
  }
  ExpressionPtr ArrayOf(const ExpressionPtr& item, int32_t min, int32_t max) {
    if (max == 0) return Sequence({Literal("["), Space(), Literal("]")});
    const ExpressionPtr more =
        Repeat(Sequence({Comma(), item}), std::max(min - 1, 0), max < 0 ? -1 : max - 1);
    const ExpressionPtr items = Sequence({item, more, Space()});
    return Sequence({Literal("["), Space(), min == 0 ? Optional(items) : items, Literal("]")});
  }

  const OrderedJson& root_;
  Grammar& grammar_;
  std::map<std::string, int32_t> shared_;
  std::map<std::string, int32_t> references_;
};

Status SchemaBuilder::CheckOnly(const OrderedJson& schema, const std::set<std::string>& allowed,
                                const std::string& path) const {
  for (const auto& [key, value] : schema.items()) {
    if (!allowed.contains(key) && !kAnnotations.contains(key))
      return Refuse(path, "the keyword '{}' is not supported here", key);
  }
  return OkStatus();
}

StatusOr<ExpressionPtr> SchemaBuilder::Build(const OrderedJson& schema, const std::string& path, int depth) {
  if (depth > kDepthMax || grammar_.rules.size() > kRulesMax) return Refuse(path, "the schema is too large");
  if (schema.is_boolean() && schema.get<bool>()) return Value();
  if (!schema.is_object()) return Refuse(path, "a schema must be an object");
  if (schema.contains("$ref")) return BuildReference(schema, path, depth);
  if (schema.contains("const") || schema.contains("enum")) return BuildValues(schema, path);
  for (const char* key : {"anyOf", "oneOf", "allOf"}) {
    if (schema.contains(key)) return BuildAlternatives(schema, key, path, depth);
  }
  std::vector<std::string> types;
  if (const auto type = schema.find("type"); type != schema.end()) {
    for (const OrderedJson& name : type->is_array() ? *type : OrderedJson::array({*type})) {
      if (!name.is_string() || !kKeywords.contains(name.get<std::string>()))
        return Refuse(path, "'type' must be object, array, string, integer, number, boolean or null");
      types.push_back(name.get<std::string>());
    }
    if (types.empty()) return Refuse(path, "'type' is empty");
  } else {
    // What is constrained says what is meant.
    for (const auto& [type_name, keywords] : kKeywords) {
      const bool meant = std::any_of(keywords.begin(), keywords.end(),
                                     [&](const std::string& keyword) { return schema.contains(keyword); });
      if (meant) types.push_back(type_name);
    }
    if (types.empty()) {
      MR_RETURN_IF_ERROR(CheckOnly(schema, {}, path));
      return Value();
    }
  }
  std::set<std::string> allowed = {"type"};
  for (const std::string& type : types) allowed.insert(kKeywords.at(type).begin(), kKeywords.at(type).end());
  MR_RETURN_IF_ERROR(CheckOnly(schema, allowed, path));
  std::vector<ExpressionPtr> parts;
  for (const std::string& type : types) {
    MR_ASSIGN_OR_RETURN(ExpressionPtr part, BuildType(type, schema, path, depth));
    parts.push_back(std::move(part));
  }
  return Choice(std::move(parts));
}

StatusOr<ExpressionPtr> SchemaBuilder::BuildReference(const OrderedJson& schema, const std::string& path,
                                                      int depth) {
  MR_RETURN_IF_ERROR(CheckOnly(schema, {"$ref"}, path));
  if (!schema["$ref"].is_string()) return Refuse(path, "'$ref' must be a string");
  const std::string target = schema["$ref"].get<std::string>();
  if (const auto found = references_.find(target); found != references_.end()) return RuleCall(found->second);
  if (!target.starts_with('#'))
    return Refuse(path, "'$ref' to '{}': only references into this schema are followed", target);
  const OrderedJson* place = &root_;
  std::string part;
  for (size_t at = 1; at < target.size(); at += part.size() + 1) {
    part = target.substr(at + 1, target.find('/', at + 1) - at - 1);
    if (target[at] != '/' || !place->is_object() || !place->contains(part))
      return Refuse(path, "'$ref' to '{}' leads nowhere", target);
    place = &(*place)[part];
  }
  const int32_t rule = grammar_.Add(target, nullptr);
  references_[target] = rule;
  MR_ASSIGN_OR_RETURN(ExpressionPtr body, Build(*place, target, depth + 1));
  grammar_.rules[static_cast<size_t>(rule)].body = std::move(body);
  return RuleCall(rule);
}

StatusOr<ExpressionPtr> SchemaBuilder::BuildValues(const OrderedJson& schema, const std::string& path) {
  MR_RETURN_IF_ERROR(CheckOnly(schema, {"const", "enum", "type"}, path));
  OrderedJson values = OrderedJson::array();
  if (schema.contains("const")) {
    values.push_back(schema["const"]);
  } else if (schema["enum"].is_array()) {
    values = schema["enum"];
  }
  std::vector<ExpressionPtr> parts;
  std::string kept;
  for (const OrderedJson& value : values) {
    const bool fits = !schema.contains("type") ||
                      (schema["type"].is_string() && OfType(value, schema["type"])) ||
                      schema["type"].is_array();
    if (!fits) continue;
    const std::string text = DumpJson(value);
    parts.push_back(Literal(text));
    kept += text + ",";
  }
  if (parts.empty()) return Refuse(path, "no value is possible");
  if (parts.size() == 1) return parts[0];
  return Once("one of " + kept, Choice(std::move(parts)));
}

// oneOf is kept only where no value fits two alternatives: they differ in type, or in a constant property
// that both require.
Status SchemaBuilder::CheckTellApart(const OrderedJson& alternatives, const std::string& path) const {
  const auto resolved = [this](const OrderedJson& schema) -> const OrderedJson& {
    if (!schema.is_object() || !schema.contains("$ref") || !schema["$ref"].is_string()) return schema;
    const std::string target = schema["$ref"].get<std::string>();
    for (const char* home : {"$defs", "definitions"}) {
      const std::string prefix = std::string("#/") + home + "/";
      if (target.starts_with(prefix) && root_.contains(home) &&
          root_[home].contains(target.substr(prefix.size())))
        return root_[home][target.substr(prefix.size())];
    }
    return schema;
  };
  const auto constant = [](const OrderedJson& schema, const std::string& name) -> const OrderedJson* {
    const auto properties = schema.find("properties");
    if (properties == schema.end() || !properties->is_object() || !properties->contains(name)) return nullptr;
    const OrderedJson& property = (*properties)[name];
    const auto required = schema.find("required");
    const bool needed = required != schema.end() && required->is_array() &&
                        std::find(required->begin(), required->end(), name) != required->end();
    return needed && property.is_object() && property.contains("const") ? &property["const"] : nullptr;
  };
  const auto differ = [&](const OrderedJson& a, const OrderedJson& b) {
    if (!a.is_object() || !b.is_object()) return false;
    const auto type_a = a.find("type");
    const auto type_b = b.find("type");
    if (type_a == a.end() || type_b == b.end() || !type_a->is_string() || !type_b->is_string()) return false;
    const bool numbers =
        (*type_a == "number" || *type_a == "integer") && (*type_b == "number" || *type_b == "integer");
    if (*type_a != *type_b) return !numbers;
    if (*type_a != "object" || !a.contains("properties") || !a["properties"].is_object()) return false;
    for (const auto& [name, property] : a["properties"].items()) {
      const OrderedJson* const left = constant(a, name);
      const OrderedJson* const right = constant(b, name);
      if (left != nullptr && right != nullptr && *left != *right) return true;
    }
    return false;
  };
  for (size_t i = 0; i < alternatives.size(); ++i) {
    for (size_t j = i + 1; j < alternatives.size(); ++j) {
      if (!differ(resolved(alternatives[i]), resolved(alternatives[j]))) {
        return Refuse(path,
                      "the keyword 'oneOf' is supported where alternatives differ in type or in a required "
                      "constant property; use 'anyOf'");
      }
    }
  }
  return OkStatus();
}

StatusOr<ExpressionPtr> SchemaBuilder::BuildAlternatives(const OrderedJson& schema, const char* key,
                                                         const std::string& path, int depth) {
  MR_RETURN_IF_ERROR(CheckOnly(schema, {key, "discriminator"}, path));
  const OrderedJson& list = schema[key];
  if (!list.is_array() || list.empty()) return Refuse(path, "'{}' must be a list with entries", key);
  const bool all = std::string_view(key) == "allOf";
  if (all && list.size() > 1) return Refuse(path, "the keyword 'allOf' is supported with one entry only");
  if (std::string_view(key) == "oneOf") MR_RETURN_IF_ERROR(CheckTellApart(list, path));
  std::vector<ExpressionPtr> parts;
  for (size_t i = 0; i < list.size(); ++i) {
    MR_ASSIGN_OR_RETURN(ExpressionPtr part, Build(list[i], fmt::format("{}/{}/{}", path, key, i), depth + 1));
    parts.push_back(std::move(part));
  }
  return AsRule(path, Choice(std::move(parts)));
}

StatusOr<ExpressionPtr> SchemaBuilder::BuildType(const std::string& type, const OrderedJson& schema,
                                                 const std::string& path, int depth) {
  if (type == "object") return BuildObject(schema, path, depth);
  if (type == "array") return BuildArray(schema, path, depth);
  if (type == "string") return BuildString(schema, path);
  if (type == "integer") return BuildInteger(schema, path);
  if (type == "number") return Number();
  if (type == "boolean") return Choice({Literal("true"), Literal("false")});
  return Literal("null");
}

StatusOr<ExpressionPtr> SchemaBuilder::BuildObject(const OrderedJson& schema, const std::string& path,
                                                   int depth) {
  struct Member {
    ExpressionPtr pair;
    bool required = false;
  };
  std::vector<Member> members;
  std::vector<std::string> required;
  if (const auto list = schema.find("required"); list != schema.end()) {
    for (const OrderedJson& name : *list) {
      if (!list->is_array() || !name.is_string()) return Refuse(path, "'required' must be a list of strings");
      required.push_back(name.get<std::string>());
    }
  }
  const auto add = [&](const std::string& name, ExpressionPtr value, bool needed) {
    members.push_back({Sequence({Literal(DumpJson(OrderedJson(name))), Colon(), std::move(value)}), needed});
  };
  std::set<std::string> declared;
  if (const auto properties = schema.find("properties"); properties != schema.end()) {
    if (!properties->is_object()) return Refuse(path, "'properties' must be an object");
    for (const auto& [name, property] : properties->items()) {
      MR_ASSIGN_OR_RETURN(ExpressionPtr value, Build(property, path + "/properties/" + name, depth + 1));
      declared.insert(name);
      add(name, std::move(value), std::find(required.begin(), required.end(), name) != required.end());
    }
  }
  const auto additional = schema.find("additionalProperties");
  ExpressionPtr any = Value();
  if (additional != schema.end() && additional->is_object()) {
    MR_ASSIGN_OR_RETURN(any, Build(*additional, path + "/additionalProperties", depth + 1));
  }
  for (const std::string& name : required) {
    if (declared.insert(name).second) add(name, any, true);
  }
  if (members.empty()) {
    const bool closed = additional != schema.end() && additional->is_boolean() && !additional->get<bool>();
    if (closed) return Sequence({Literal("{"), Space(), Literal("}")});
    return AsRule(path, ObjectOf(any));
  }
  // rest: what may come from member i on when one was written before; a rule of its own, so that the ways to
  // begin after several optional members share it. first: likewise when none was.
  ExpressionPtr rest = Space();
  ExpressionPtr first = Space();
  for (size_t i = members.size(); i-- > 0;) {
    const ExpressionPtr written = Sequence({members[i].pair, rest});
    const ExpressionPtr next = Sequence({Comma(), members[i].pair});
    first = members[i].required ? written : Choice({written, first});
    rest = AsRule(path, members[i].required ? Sequence({next, rest}) : Sequence({Optional(next), rest}));
  }
  return AsRule(path, Sequence({Literal("{"), Space(), first, Literal("}")}));
}

StatusOr<int32_t> SchemaBuilder::Count(const OrderedJson& schema, const char* key, int32_t absent,
                                       const std::string& path) {
  const auto found = schema.find(key);
  if (found == schema.end()) return absent;
  if (!found->is_number_integer() || *found < 0 || *found > kLengthMax)
    return Refuse(path, "'{}' must be a whole number from 0 to {}", key, kLengthMax);
  return found->get<int32_t>();
}

StatusOr<ExpressionPtr> SchemaBuilder::BuildArray(const OrderedJson& schema, const std::string& path,
                                                  int depth) {
  MR_ASSIGN_OR_RETURN(const int32_t min, Count(schema, "minItems", 0, path));
  MR_ASSIGN_OR_RETURN(const int32_t max, Count(schema, "maxItems", -1, path));
  if (max >= 0 && max < min) return Refuse(path, "'maxItems' is less than 'minItems'");
  ExpressionPtr item = Value();
  if (schema.contains("items")) {
    MR_ASSIGN_OR_RETURN(item, Build(schema["items"], path + "/items", depth + 1));
  }
  return AsRule(path, ArrayOf(item, min, max));
}

StatusOr<ExpressionPtr> SchemaBuilder::BuildString(const OrderedJson& schema, const std::string& path) {
  MR_ASSIGN_OR_RETURN(const int32_t min, Count(schema, "minLength", 0, path));
  MR_ASSIGN_OR_RETURN(const int32_t max, Count(schema, "maxLength", -1, path));
  if (max >= 0 && max < min) return Refuse(path, "'maxLength' is less than 'minLength'");
  const bool lengths = schema.contains("minLength") || schema.contains("maxLength");
  const auto pattern = schema.find("pattern");
  const auto format = schema.find("format");
  if (static_cast<int>(lengths) + (pattern != schema.end()) + (format != schema.end()) > 1)
    return Refuse(path, "a length, 'pattern' and 'format' are supported one at a time");
  std::string text;
  if (pattern != schema.end()) {
    if (!pattern->is_string()) return Refuse(path, "'pattern' must be a string");
    text = pattern->get<std::string>();
  } else if (format != schema.end()) {
    const auto known = format->is_string() ? kFormats.find(format->get<std::string>()) : kFormats.end();
    if (known == kFormats.end()) return Refuse(path, "the format {} is not supported", DumpJson(*format));
    text = std::string("^(") + known->second + ")$";
  } else if (lengths) {
    return Once(fmt::format("string of {} to {}", min, max),
                Sequence({Literal("\""), Repeat(MakeCharacter(), min, max), Literal("\"")}));
  } else {
    return String();
  }
  auto parsed = ParseRegex(text);
  if (!parsed.ok()) return Annotate(parsed.status(), fmt::format("schema at '{}'", path));
  // A pattern is looked for anywhere in the string unless it says otherwise.
  std::vector<ExpressionPtr> parts = {Literal("\"")};
  const bool begins = text.starts_with('^');
  const bool ends = text.ends_with('$') && !text.ends_with("\\$");
  if (!begins) parts.push_back(Repeat(MakeCharacter(), 0, -1));
  parts.push_back(EscapedForJson(*parsed));
  if (!ends) parts.push_back(Repeat(MakeCharacter(), 0, -1));
  parts.push_back(Literal("\""));
  return Once("string like " + text, Sequence(std::move(parts)));
}

StatusOr<ExpressionPtr> SchemaBuilder::BuildInteger(const OrderedJson& schema, const std::string& path) {
  constexpr int64_t kLimit = 999'999'999'999'999;  // every double holds it exactly
  int64_t low = -kLimit;
  int64_t high = kLimit;
  bool limited = false;
  for (const char* key : {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}) {
    const auto found = schema.find(key);
    if (found == schema.end()) continue;
    if (!found->is_number_integer() || *found < -kLimit || *found > kLimit)
      return Refuse(path, "'{}' must be a whole number between {} and {}", key, -kLimit, kLimit);
    const int64_t value = found->get<int64_t>();
    const std::string_view name = key;
    limited = true;
    if (name == "minimum") low = std::max(low, value);
    if (name == "maximum") high = std::min(high, value);
    if (name == "exclusiveMinimum") low = std::max(low, value + 1);
    if (name == "exclusiveMaximum") high = std::min(high, value - 1);
  }
  if (!limited) return Integer();
  if (low > high) return Refuse(path, "no number is possible");
  std::vector<ExpressionPtr> parts;
  if (low < 0) parts.push_back(Sequence({Literal("-"), Natural(std::max<int64_t>(1, -high), -low)}));
  if (high >= 0) parts.push_back(Natural(std::max<int64_t>(0, low), high));
  return Choice(std::move(parts));
}

}  // namespace

StatusOr<ExpressionPtr> AddJsonSchema(const OrderedJson& schema, Grammar* grammar) {
  return SchemaBuilder(schema, grammar).Build(schema, "#", 0);
}

}  // namespace millrace::engine
