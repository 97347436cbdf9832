//! Checks a server with async-openai: `async_openai_checks URL`. Prints a line per check; the exit status is 1 if one fails.

use async_openai::Client;
use async_openai::config::OpenAIConfig;
use async_openai::error::OpenAIError;
use futures::StreamExt as _;
use serde_json::{Value, json};

type Outcome = Result<(), Box<dyn std::error::Error>>;

#[tokio::main]
async fn main() {
    let url = std::env::args().nth(1).expect("a URL");
    let config = OpenAIConfig::new().with_api_base(format!("{url}/v1")).with_api_key("none");
    let client = Client::with_config(config);
    let checks = [
        ("models", models(&client).await),
        ("a chat", chat(&client).await),
        ("a streamed chat", streamed_chat(&client).await),
        ("a call and its result", call(&client).await),
        ("a completion", completion(&client).await),
        ("a response", response(&client).await),
        ("a streamed response", streamed_response(&client).await),
        ("a request that is wrong", wrong(&client).await),
    ];
    let mut failed = false;
    for (name, outcome) in checks {
        match outcome {
            Ok(()) => println!("ok: {name}"),
            Err(error) => {
                println!("FAILED: {name}: {error}");
                failed = true;
            }
        }
    }
    std::process::exit(failed.into());
}

/// An error that shows what was found.
fn expect(holds: bool, found: impl std::fmt::Debug) -> Outcome {
    if holds { Ok(()) } else { Err(format!("found {found:?}").into()) }
}

/// The requests' types are the client's; JSON is the shortest way to write them.
fn request<T: serde::de::DeserializeOwned>(value: Value) -> Result<T, serde_json::Error> {
    serde_json::from_value(value)
}

const SAID: &str = "The shell has answered.";

fn question() -> Value {
    json!({"model": "", "messages": [{"role": "user", "content": "Hi"}]})
}

async fn models(client: &Client<OpenAIConfig>) -> Outcome {
    let list = client.models().list().await?;
    let id = &list.data.first().ok_or("no model")?.id;
    let model = client.models().retrieve(id).await?;
    expect(model.id == *id, model)
}

async fn chat(client: &Client<OpenAIConfig>) -> Outcome {
    let answer = client.chat().create(request(question())?).await?;
    let choice = answer.choices.first().ok_or("no choice")?;
    expect(choice.message.content.as_deref() == Some(SAID) && answer.usage.is_some(), &answer)
}

async fn streamed_chat(client: &Client<OpenAIConfig>) -> Outcome {
    let mut stream = client.chat().create_stream(request(question())?).await?;
    let mut text = String::new();
    let mut finish = None;
    while let Some(chunk) = stream.next().await {
        for choice in chunk?.choices {
            text += choice.delta.content.as_deref().unwrap_or_default();
            finish = choice.finish_reason.or(finish);
        }
    }
    expect(text == SAID && finish.is_some(), (text, finish))
}

async fn call(client: &Client<OpenAIConfig>) -> Outcome {
    let mut conversation = json!({
        "model": "",
        "messages": [{"role": "user", "content": "[case 0] Please use get_weather."}],
        "tools": [{"type": "function", "function": {
            "name": "get_weather", "parameters": {"type": "object", "properties": {"location": {"type": "string"}}}
        }}]
    });
    let answer = client.chat().create(request(conversation.clone())?).await?;
    let message = serde_json::to_value(&answer.choices.first().ok_or("no choice")?.message)?;
    let function = &message["tool_calls"][0]["function"];
    let arguments: Value = serde_json::from_str(function["arguments"].as_str().unwrap_or_default())?;
    expect(function["name"] == "get_weather" && arguments["location"] == "Tokyo", &message)?;
    let result = json!({"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "sunny"});
    conversation["messages"].as_array_mut().ok_or("no messages")?.extend([message, result]);
    let answer = client.chat().create(request(conversation)?).await?;
    let text = answer.choices.first().and_then(|choice| choice.message.content.as_deref());
    expect(text == Some("Done with case 0."), &answer)
}

async fn completion(client: &Client<OpenAIConfig>) -> Outcome {
    let answer =
        client.completions().create(request(json!({"model": "", "prompt": "Hi", "max_tokens": 3}))?).await?;
    expect(
        answer.choices.len() == 1 && answer.usage.is_some_and(|usage| usage.completion_tokens == 3),
        "other counts",
    )
}

async fn response(client: &Client<OpenAIConfig>) -> Outcome {
    let answer = client.responses().create(request(json!({"model": "", "input": "Hi"}))?).await?;
    expect(answer.output_text().as_deref() == Some(SAID), &answer)
}

async fn streamed_response(client: &Client<OpenAIConfig>) -> Outcome {
    let mut stream = client.responses().create_stream(request(json!({"model": "", "input": "Hi"}))?).await?;
    let mut text = String::new();
    let mut last = Value::Null;
    while let Some(event) = stream.next().await {
        last = serde_json::to_value(event?)?;
        if last["type"] == "response.output_text.delta" {
            text += last["delta"].as_str().unwrap_or_default();
        }
    }
    expect(text == SAID && last["type"] == "response.completed", (text, last))
}

async fn wrong(client: &Client<OpenAIConfig>) -> Outcome {
    let mut question = question();
    question["temperature"] = 9.0.into();
    match client.chat().create(request(question)?).await {
        Err(OpenAIError::ApiError(error)) => {
            expect(error.status_code == 400 && error.api_error.param.as_deref() == Some("temperature"), error)
        }
        other => Err(format!("found {other:?}").into()),
    }
}
