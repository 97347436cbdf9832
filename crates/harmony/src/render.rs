//! Messages to tokens. Text becomes ordinary tokens only, each run on its own, so nothing that a user writes can turn into
//! a control token.

use crate::message::{Content, Message, Mode, RenderOptions, ResponseFormat, Role, SystemContent};
use crate::schema::tools_block;
use crate::{Error, Harmony};

/// The namespace of a developer's functions.
pub(crate) const FUNCTIONS: &str = "functions";

impl Harmony {
    /// Renders messages in order.
    pub fn render(&self, messages: &[Message], options: &RenderOptions) -> Result<Vec<u32>, Error> {
        let last_is_final =
            messages.iter().rev().find(|m| m.role == Role::Assistant).is_some_and(|m| m.is_on("final"));
        let first_final = messages.iter().position(|m| m.is_on("final")).unwrap_or(0);
        let drop_before = if options.auto_drop_analysis && last_is_final { first_final } else { 0 };
        let function_tools = messages.iter().any(has_function_tools);

        let mut ids = Vec::new();
        for (i, message) in messages.iter().enumerate() {
            if i < drop_before && message.is_on("analysis") {
                continue;
            }
            self.render_message(message, i, function_tools, &mut ids)?;
        }
        match options.mode {
            Mode::Completion(role) => {
                ids.push(self.control.start);
                self.render_text(role.name(), &mut ids);
            }
            Mode::Conversation => {}
            Mode::Training => {
                if let Some(last) = ids.last_mut()
                    && messages.last().is_some_and(|m| m.role == Role::Assistant && m.is_on("final"))
                    && *last == self.control.end
                {
                    *last = self.control.r#return;
                }
            }
        }
        Ok(ids)
    }

    fn render_message(
        &self,
        message: &Message,
        index: usize,
        function_tools: bool,
        ids: &mut Vec<u32>,
    ) -> Result<(), Error> {
        ids.push(self.control.start);
        if let Some(generated) = &message.generated {
            self.render_text(message.role.name(), ids);
            ids.extend(generated);
            return Ok(());
        }
        match (&message.name, message.role) {
            (Some(name), Role::Tool) => self.render_text(name, ids),
            (None, Role::Tool) => {
                return Err(Error::invalid(
                    format!("messages.{index}.name"),
                    "a tool's message needs its name",
                ));
            }
            (name, role) => {
                self.render_text(role.name(), ids);
                if let Some(name) = name {
                    self.render_text(&format!(":{name}"), ids);
                }
            }
        }
        if let Some(recipient) = message.recipient.as_deref().filter(|r| *r != "all") {
            self.render_text(&format!(" to={recipient}"), ids);
        }
        if let Some(channel) = &message.channel {
            ids.push(self.control.channel);
            self.render_text(channel, ids);
        }
        if let Some(content_type) = &message.content_type {
            match content_type.strip_prefix("<|constrain|>") {
                Some(rest) => {
                    self.render_text(" ", ids);
                    ids.push(self.control.constrain);
                    self.render_text(rest, ids);
                }
                None => self.render_text(&format!(" {content_type}"), ids),
            }
        }
        ids.push(self.control.message);
        for (part, content) in message.content.iter().enumerate() {
            let misplaced = |what: &str| {
                let field = format!("messages.{index}.content.{part}");
                let role = message.role.name();
                Err(Error::invalid(
                    field,
                    format!("{what} content may not appear in a message of the {role}"),
                ))
            };
            match content {
                Content::Text { text } => self.render_text(text, ids),
                Content::SystemContent(system) if message.role == Role::System => {
                    self.render_text(&system_text(system, function_tools), ids);
                }
                Content::DeveloperContent { instructions, tools, response_format }
                    if message.role == Role::Developer =>
                {
                    let mut sections = Vec::new();
                    if let Some(instructions) = instructions {
                        sections.push("# Instructions".to_owned());
                        sections.push(instructions.clone());
                    }
                    sections.extend(tools.as_ref().filter(|tools| !tools.is_empty()).map(tools_block));
                    sections.extend(response_format.as_deref().map(format_block));
                    self.render_text(&sections.join("\n\n"), ids);
                }
                Content::SystemContent(_) => return misplaced("system"),
                Content::DeveloperContent { .. } => return misplaced("developer"),
            }
        }
        let is_call = message.role == Role::Assistant && message.recipient.is_some();
        ids.push(if is_call { self.control.call } else { self.control.end });
        Ok(())
    }

    fn render_text(&self, text: &str, ids: &mut Vec<u32>) {
        ids.extend(self.tokenizer.encode(text));
    }
}

fn format_block(format: &ResponseFormat) -> String {
    let mut text = format!("# Response Formats\n\n## {}\n\n", format.name);
    let description = format.description.as_deref().filter(|description| !description.is_empty());
    for line in description.into_iter().flat_map(str::lines) {
        text += &format!("// {line}\n");
    }
    text + &format.schema.to_string()
}

fn has_function_tools(message: &Message) -> bool {
    message.content.iter().any(|content| match content {
        Content::DeveloperContent { tools: Some(tools), .. } => {
            tools.get(FUNCTIONS).is_some_and(|namespace| !namespace.tools.is_empty())
        }
        _ => false,
    })
}

fn system_text(system: &SystemContent, function_tools: bool) -> String {
    let mut sections = Vec::new();
    let mut top: Vec<String> = system.model_identity.iter().cloned().collect();
    top.extend(system.knowledge_cutoff.iter().map(|cutoff| format!("Knowledge cutoff: {cutoff}")));
    top.extend(system.conversation_start_date.iter().map(|date| format!("Current date: {date}")));
    if !top.is_empty() {
        sections.push(top.join("\n"));
    }
    sections
        .extend(system.reasoning_effort.iter().map(|effort| format!("Reasoning: {}", effort.to_lowercase())));
    sections.extend(system.tools.as_ref().filter(|tools| !tools.is_empty()).map(tools_block));
    if let Some(config) = system.channel_config.as_ref().filter(|config| !config.valid_channels.is_empty()) {
        let mut line = format!("# Valid channels: {}.", config.valid_channels.join(", "));
        if config.channel_required {
            line += " Channel must be included for every message.";
        }
        if function_tools {
            line += "\nCalls to these tools must go to the commentary channel: 'functions'.";
        }
        sections.push(line);
    }
    sections.join("\n\n")
}
