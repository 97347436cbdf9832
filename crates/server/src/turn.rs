//! Tools, `tool_choice`, the answer's form and the wish not to reason: what a turn may consist of (`serving.md` 9.3, 9.4).

use std::collections::HashSet;

use engine::{Form, Grammar, Grammars, TurnRules, Whitespace};
use harmony::{ChatTool, FunctionTool};
use serde_json::json;

use crate::error::ApiError;
use crate::form::{self, Wanted};
use crate::json::{Field, Object, excerpt};
use crate::request::Context;

pub(crate) const MAX_TOOLS: usize = 512;
/// Of all tools together, as JSON: their trees take up to fifty times as much memory.
pub(crate) const MAX_TOOLS_BYTES: usize = 1 << 20;
const MAX_TOOL_NAME: usize = 64;

/// A turn's constraint, not compiled yet.
#[derive(Debug, Default)]
pub(crate) struct Turn {
    rules: Option<TurnRules>,
    /// The fields to complain about.
    pub(crate) answer_param: String,
    call_params: Vec<String>,
    /// The prompt is to go on with the header of the final answer.
    pub(crate) answer_at_once: bool,
}

impl Turn {
    /// A turn without tools to call and without a demanded form needs no rules; nor does one in which the model may do as it
    /// likes.
    pub(crate) fn new(
        tools: Option<&Tools>,
        choice: &Choice,
        many_calls: bool,
        wanted: Option<&Wanted>,
        reasoning: bool,
        context: &Context<'_>,
    ) -> Turn {
        let tools = tools.map_or(&[][..], |tools| &tools.tools);
        let callable = tools.iter().filter(|tool| match choice {
            Choice::None => false,
            Choice::Auto | Choice::Required => true,
            Choice::Named(name) => tool.tool.function.name == *name,
            Choice::Allowed { names, .. } => names.contains(&tool.tool.function.name),
        });
        let callable: Vec<&Tool> = callable.collect();
        let forced =
            matches!(choice, Choice::Required | Choice::Named(_) | Choice::Allowed { required: true, .. });
        let is_strict = |tool: &Tool| tool.strict == Some(true) || context.strict_arguments && !tool.free;
        let strict = callable.iter().any(|tool| is_strict(tool));
        let suppressed = callable.len() < tools.len();
        if wanted.is_none() && !forced && !strict && !suppressed && (reasoning || callable.is_empty()) {
            return Turn { answer_at_once: !reasoning, ..Turn::default() };
        }
        let arguments = |tool: &Tool| {
            if tool.free || !forced && !is_strict(tool) {
                return Form::Text;
            }
            let schema = tool.tool.function.parameters.clone();
            let schema = schema.filter(|schema| schema.as_object().is_some_and(|object| !object.is_empty()));
            context.json.apply(Form::Json {
                schema: schema.unwrap_or_else(|| json!({"type": "object"})),
                lenient: tool.strict != Some(true),
                whitespace: Whitespace::default(),
            })
        };
        let answer = || wanted.map_or(Form::Text, |wanted| context.json.apply(wanted.form.clone()));
        let rules = TurnRules {
            reasoning,
            answer: (!forced).then(answer),
            calls: callable.iter().map(|tool| (tool.tool.function.name.clone(), arguments(tool))).collect(),
            many_calls: many_calls && !matches!(choice, Choice::Named(_)),
        };
        Turn {
            rules: Some(rules),
            answer_param: wanted.map_or_else(|| "tool_choice".to_owned(), |wanted| wanted.param.clone()),
            call_params: callable.iter().map(|tool| format!("{}.parameters", tool.path)).collect(),
            answer_at_once: false,
        }
    }

    /// The grammar, if one is needed.
    pub(crate) fn compile(&self, grammars: &Grammars) -> Result<Option<Grammar>, ApiError> {
        let refusal = |error| form::refusal(&error, &self.answer_param, &self.call_params);
        self.rules.as_ref().map(|rules| grammars.turn(rules)).transpose().map_err(refusal)
    }

    pub(crate) fn is_free(&self) -> bool {
        self.rules.is_none()
    }
}

/// Declared functions.
#[derive(Debug)]
pub(crate) struct Tools {
    tools: Vec<Tool>,
    field: String,
    bytes: usize,
}

#[derive(Debug)]
struct Tool {
    tool: ChatTool,
    strict: Option<bool>,
    /// Its argument is a text, not JSON.
    free: bool,
    /// The group that it was declared in, which begins its name.
    namespace: Option<String>,
    /// Where it came from, to complain about.
    path: String,
}

impl Tools {
    /// In the form of chat completions.
    pub(crate) fn read(field: &Field<'_>) -> Result<Tools, ApiError> {
        let mut tools = Tools::bounded(field)?;
        for tool in field.array(MAX_TOOLS)? {
            let object = tool.object(&["type", "function"])?;
            let kind = object.required("type")?;
            if kind.string()? != "function" {
                return Err(kind.error("Only tools of type function are supported."));
            }
            tools.add(&object.required("function")?)?;
        }
        Ok(tools)
    }

    /// `functions`.
    pub(crate) fn read_legacy(field: &Field<'_>) -> Result<Tools, ApiError> {
        let mut tools = Tools::bounded(field)?;
        for function in field.array(MAX_TOOLS)? {
            tools.add(&function)?;
        }
        Ok(tools)
    }

    /// No tools yet, of a field that is not too large.
    pub(crate) fn bounded(field: &Field<'_>) -> Result<Tools, ApiError> {
        if field.text().len() > MAX_TOOLS_BYTES {
            return Err(field.error(format!("{} is longer than {MAX_TOOLS_BYTES} bytes.", field.path())));
        }
        Ok(Tools { tools: Vec::new(), field: field.path().to_owned(), bytes: field.text().len() })
    }

    /// Adds a function: `name`, `description`, `parameters` and `strict`, wherever they stand.
    pub(crate) fn add(&mut self, field: &Field<'_>) -> Result<(), ApiError> {
        let object = field.object(&["name", "description", "parameters", "strict"])?;
        let name = object.required("name")?;
        let parameters = match object.field("parameters") {
            Some(schema) if schema.is_object() => Some(schema.value(MAX_TOOLS_BYTES)?),
            Some(schema) => return Err(schema.error(format!("{} must be an object.", schema.path()))),
            None => None,
        };
        let strict = object.bool("strict")?;
        let description = object.string("description")?;
        let function = FunctionTool { name: name.string()?, description, parameters };
        self.push(Tool {
            tool: ChatTool { function },
            strict,
            free: false,
            namespace: None,
            path: field.path().to_owned(),
        })
    }

    /// Those in namespaces count like others.
    fn push(&mut self, tool: Tool) -> Result<(), ApiError> {
        if self.tools.len() == MAX_TOOLS {
            let field = &self.field;
            return Err(ApiError::invalid(field, format!("{field} has more than {MAX_TOOLS} functions.")));
        }
        self.tools.push(tool);
        Ok(())
    }

    /// In the flat form of responses.
    pub(crate) fn read_flat(field: &Field<'_>) -> Result<Tools, ApiError> {
        let mut tools = Tools::bounded(field)?;
        for tool in field.array(MAX_TOOLS)? {
            let kind = tool.object(&["type"])?.required("type")?;
            match kind.string()?.as_str() {
                "function" => tools.add(&tool)?,
                "custom" => {
                    tools.add(&tool)?;
                    tools.tools.last_mut().expect("one was added").make_free();
                }
                "namespace" => {
                    let object = tool.object(&["name", "tools"])?;
                    let field = object.required("name")?;
                    let name = field.string()?;
                    // Before each of its functions has a copy.
                    check_name(field.path(), &name)?;
                    for inner in object.required("tools")?.array(MAX_TOOLS)? {
                        let kind = inner.object(&["type"])?.required("type")?;
                        if kind.string()? != "function" {
                            return Err(kind.error("Only functions can be in a namespace."));
                        }
                        tools.add(&inner)?;
                        tools.tools.last_mut().expect("one was added").put_in(&name);
                    }
                }
                name @ ("local_shell" | "shell") => tools.push(Tool::shell(name, tool.path()))?,
                // Nobody searches here. The model is not told of it, and answers from what it knows.
                kind if is_search(kind) => {}
                other => {
                    let message = format!(
                        "Tools of type {} are not supported: only function, custom, namespace and shell are.",
                        excerpt(other)
                    );
                    return Err(kind.error(message));
                }
            }
        }
        Ok(tools)
    }

    /// Functions of namespaces: the namespace, and the name within it.
    pub(crate) fn namespaced(&self) -> Vec<(String, String)> {
        let split = |tool: &Tool| {
            let namespace = tool.namespace.clone()?;
            let name = tool.inner_name().to_owned();
            Some((namespace, name))
        };
        self.tools.iter().filter_map(split).collect()
    }

    /// The names of the tools whose argument is a text.
    pub(crate) fn free(&self) -> Vec<String> {
        let free = self.tools.iter().filter(|tool| tool.free);
        free.map(|tool| tool.tool.function.name.clone()).collect()
    }

    /// Names follow the rule and are different.
    pub(crate) fn check(&self) -> Result<(), ApiError> {
        if self.tools.is_empty() {
            let field = &self.field;
            let message = format!(
                "`{field}` must not be an empty array. Either provide at least one tool or omit the field entirely."
            );
            return Err(ApiError::invalid(field, message));
        }
        let mut names = HashSet::new();
        for tool in &self.tools {
            let (name, path) = (&tool.tool.function.name, format!("{}.name", tool.path));
            check_name(&path, tool.inner_name())?;
            if !names.insert(name.as_str()) {
                return Err(ApiError::invalid(&path, format!("Two tools are named {name}.")));
            }
        }
        Ok(())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.tools.is_empty()
    }

    /// How long they are as JSON.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// As the prompt shows them.
    pub(crate) fn shown(&self) -> Vec<ChatTool> {
        self.tools.iter().map(|tool| tool.tool.clone()).collect()
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.tools.iter().map(|tool| tool.tool.function.name.clone()).collect()
    }
}

/// The name at this path, of a function or of a namespace, follows the rule.
fn check_name(path: &str, name: &str) -> Result<(), ApiError> {
    let letter = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    if (1..=MAX_TOOL_NAME).contains(&name.len()) && name.chars().all(letter) {
        return Ok(());
    }
    let message = format!(
        "{path} must be 1 to {MAX_TOOL_NAME} letters, digits, `_`, `.` or `-`, got {}.",
        excerpt(name)
    );
    Err(ApiError::invalid(path, message))
}

/// Whether tools of this type search the web, which whoever declares them does without if need be.
pub(crate) fn is_search(kind: &str) -> bool {
    kind.starts_with("web_search")
}

impl Tool {
    /// The name without the namespace.
    fn inner_name(&self) -> &str {
        let begin = self.namespace.as_ref().map_or(0, |namespace| namespace.len() + 1);
        &self.tool.function.name[begin..]
    }

    fn put_in(&mut self, namespace: &str) {
        self.tool.function.name = format!("{namespace}.{}", self.tool.function.name);
        self.namespace = Some(namespace.to_owned());
    }

    /// A function that runs a command on the client's machine.
    fn shell(name: &str, path: &str) -> Tool {
        let parameters = json!({
            "type": "object",
            "properties": {
                "command": {"type": "array", "items": {"type": "string"}},
                "workdir": {"type": "string"},
                "timeout_ms": {"type": "number"}
            },
            "required": ["command"]
        });
        let description = "Runs a shell command and returns its output.";
        let function = FunctionTool {
            name: name.to_owned(),
            description: Some(description.to_owned()),
            parameters: Some(parameters),
        };
        let tool = ChatTool { function };
        Tool { tool, strict: None, free: false, namespace: None, path: path.to_owned() }
    }

    fn make_free(&mut self) {
        const NOTE: &str = "The argument is plain text, not JSON.";
        self.free = true;
        let function = &mut self.tool.function;
        function.parameters = None;
        function.description = Some(match function.description.take() {
            Some(text) if !text.is_empty() => format!("{text}\n{NOTE}"),
            _ => NOTE.to_owned(),
        });
    }
}

/// What `tool_choice`, or its old name `function_call`, says.
pub(crate) struct ToolChoice {
    field: &'static str,
    asked: Asked,
}

enum Asked {
    Unsaid,
    None,
    Auto,
    Required,
    Named(String),
    Allowed {
        names: Vec<String>,
        required: bool,
        /// Where the names stand, to complain about.
        path: String,
    },
}

/// How calls may be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Choice {
    None,
    Auto,
    /// At least one call.
    Required,
    /// A call of this function.
    Named(String),
    /// Calls of these functions only, at least one if so said.
    Allowed {
        names: Vec<String>,
        required: bool,
    },
}

impl Asked {
    /// `mode`, and `tools` with their names.
    fn allowed(
        object: &Object<'_>,
        name: impl Fn(&Field<'_>) -> Result<String, ApiError>,
    ) -> Result<Asked, ApiError> {
        let tools = object.required("tools")?;
        let names = tools.array(MAX_TOOLS)?.iter().map(name).collect::<Result<_, _>>()?;
        let required = match object.field("mode") {
            None => false,
            Some(mode) => match mode.string()?.as_str() {
                "auto" => false,
                "required" => true,
                other => {
                    let message =
                        format!("{} must be auto or required, got {}.", mode.path(), excerpt(other));
                    return Err(mode.error(message));
                }
            },
        };
        Ok(Asked::Allowed { names, required, path: tools.path().to_owned() })
    }
}

impl ToolChoice {
    /// `tool_choice`, in the form of chat completions.
    pub(crate) fn read(object: &Object<'_>) -> Result<ToolChoice, ApiError> {
        let asked = match object.field("tool_choice") {
            None => Asked::Unsaid,
            Some(choice) if choice.is_object() => {
                let object = choice.object(&["type", "function", "allowed_tools"])?;
                let kind = object.required("type")?;
                let function = |object: &Object<'_>| {
                    object.required("function")?.object(&["name"])?.required("name")?.string()
                };
                match kind.string()?.as_str() {
                    "function" => Asked::Named(function(&object)?),
                    "allowed_tools" => {
                        let allowed = object.required("allowed_tools")?.object(&["mode", "tools"])?;
                        Asked::allowed(&allowed, |tool| function(&tool.object(&["function"])?))?
                    }
                    other => {
                        let other = excerpt(other);
                        let message =
                            format!("tool_choice.type must be function or allowed_tools, got {other}.");
                        return Err(kind.error(message));
                    }
                }
            }
            Some(choice) => match choice.string()?.as_str() {
                "none" => Asked::None,
                "auto" => Asked::Auto,
                "required" => Asked::Required,
                other => {
                    let message = format!(
                        "tool_choice must be none, auto, required or an object, got {}.",
                        excerpt(other)
                    );
                    return Err(choice.error(message));
                }
            },
        };
        Ok(ToolChoice { field: "tool_choice", asked })
    }

    /// `tool_choice`, in the form of responses, where clients say `auto` whether or not they have tools.
    pub(crate) fn read_flat(object: &Object<'_>) -> Result<ToolChoice, ApiError> {
        let Some(choice) = object.field("tool_choice").filter(Field::is_object) else {
            let ToolChoice { field, asked } = ToolChoice::read(object)?;
            let asked = if matches!(asked, Asked::Auto) { Asked::Unsaid } else { asked };
            return Ok(ToolChoice { field, asked });
        };
        let object = choice.object(&["type", "name", "mode", "tools"])?;
        let kind = object.required("type")?;
        let asked = match kind.string()?.as_str() {
            "function" | "custom" => Asked::Named(object.required("name")?.string()?),
            "allowed_tools" => {
                Asked::allowed(&object, |tool| tool.object(&["name"])?.required("name")?.string())?
            }
            other => {
                let message = format!(
                    "tool_choice.type must be function, custom or allowed_tools, got {}.",
                    excerpt(other)
                );
                return Err(kind.error(message));
            }
        };
        Ok(ToolChoice { field: "tool_choice", asked })
    }

    /// `function_call`.
    pub(crate) fn read_legacy(object: &Object<'_>) -> Result<ToolChoice, ApiError> {
        let asked = match object.field("function_call") {
            None => Asked::Unsaid,
            Some(choice) if choice.is_object() => {
                Asked::Named(choice.object(&["name"])?.required("name")?.string()?)
            }
            Some(choice) => match choice.string()?.as_str() {
                "none" => Asked::None,
                "auto" => Asked::Auto,
                other => {
                    let message =
                        format!("function_call must be none, auto or an object, got {}.", excerpt(other));
                    return Err(choice.error(message));
                }
            },
        };
        Ok(ToolChoice { field: "function_call", asked })
    }

    pub(crate) fn check(&self, tools: Option<&Tools>) -> Result<Choice, ApiError> {
        let tools = tools.map_or(&[][..], |tools| &tools.tools);
        match &self.asked {
            Asked::None => Ok(Choice::None),
            Asked::Unsaid if tools.is_empty() => Ok(Choice::None),
            Asked::Unsaid => Ok(Choice::Auto),
            _ if tools.is_empty() => {
                Err(ApiError::invalid(self.field, "When using `tool_choice`, `tools` must be set."))
            }
            Asked::Auto => Ok(Choice::Auto),
            Asked::Named(name) if tools.iter().all(|tool| tool.tool.function.name != *name) => {
                let message =
                    format!("{} names {}, which is not among the tools.", self.field, excerpt(name));
                Err(ApiError::invalid(self.field, message))
            }
            Asked::Allowed { names, required, path } => {
                let known = |name: &String| tools.iter().any(|tool| tool.tool.function.name == *name);
                match names.iter().find(|name| !known(name)) {
                    None if names.is_empty() && *required => {
                        Err(ApiError::invalid(path, format!("{path} must not be empty.")))
                    }
                    None => Ok(Choice::Allowed { names: names.clone(), required: *required }),
                    Some(name) => {
                        let name = excerpt(name);
                        let message = format!("{path} names {name}, which is not among the tools.");
                        Err(ApiError::invalid(path, message))
                    }
                }
            }
            Asked::Required => Ok(Choice::Required),
            Asked::Named(name) => Ok(Choice::Named(name.clone())),
        }
    }
}
