//! Integers of a JSON Schema beyond 2^53, which its compiler would round, since its numbers are F64.

use serde_json::{Number, Value};

/// The largest integer that the compiler takes, as an F64: of 64 bits with a sign it must have room for one more.
const MOST: i128 = (1 << 63) - (1 << 10);

/// Makes bounds a little narrower where that is what it takes to have them exactly, so that whatever keeps to them keeps to the schema's.
/// Values that an answer must have cannot be another number: an error, or, if `lenient`, under a name that the compiler does not know, so
/// that it leaves them out and says so.
///
/// # Errors
/// A sentence's rest that names the number.
pub(crate) fn hold(schema: &mut Value, lenient: bool) -> Result<(), String> {
    match schema {
        Value::Array(schemas) => schemas.iter_mut().try_for_each(|schema| hold(schema, lenient)),
        Value::Object(keywords) => {
            let mut left_out = Vec::new();
            for (keyword, value) in keywords.iter_mut() {
                let held = match keyword.as_str() {
                    "const" | "enum" => inexact(value).map_or(Ok(()), |number| Err(number.clone())),
                    "minimum" | "exclusiveMinimum" => narrow(value, Bound::Least),
                    "maximum" | "exclusiveMaximum" => narrow(value, Bound::Most),
                    "default" | "examples" => Ok(()),
                    "properties" | "patternProperties" | "$defs" | "definitions" => {
                        let mut members =
                            value.as_object_mut().into_iter().flat_map(|members| members.values_mut());
                        members.try_for_each(|member| hold(member, lenient))?;
                        Ok(())
                    }
                    _ => {
                        hold(value, lenient)?;
                        Ok(())
                    }
                };
                match held {
                    Ok(()) => {}
                    Err(number) if lenient => left_out.push((keyword.clone(), number)),
                    Err(number) => {
                        return Err(format!(
                            "`{keyword}` has {number}, and integers beyond 2^53 can be held to only where F64 has them \
                             exactly; a string can be any"
                        ));
                    }
                }
            }
            for (keyword, number) in left_out {
                if let Some(value) = keywords.remove(&keyword) {
                    keywords.insert(format!("{keyword} with {number}"), value);
                }
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// The first integer that F64 does not have, of a value and all that it holds.
fn inexact(value: &Value) -> Option<&Number> {
    match value {
        Value::Number(number) => integer(number).filter(|&n| !is_exact(n)).map(|_| number),
        Value::Array(values) => values.iter().find_map(inexact),
        Value::Object(members) => members.values().find_map(inexact),
        _ => None,
    }
}

fn integer(number: &Number) -> Option<i128> {
    number.as_i64().map(i128::from).or_else(|| number.as_u64().map(i128::from))
}

fn is_exact(n: i128) -> bool {
    n.abs() <= MOST && (n as f64) as i128 == n
}

#[derive(Clone, Copy)]
enum Bound {
    Least,
    Most,
}

/// The next number inwards that can be had exactly, or the one that is beyond all of them.
fn narrow(value: &mut Value, bound: Bound) -> Result<(), Number> {
    let Value::Number(number) = value else { return Ok(()) };
    let Some(n) = integer(number).filter(|&n| !is_exact(n)) else { return Ok(()) };
    let near = n as f64;
    let inner = match bound {
        Bound::Least if (near as i128) < n => near.next_up(),
        Bound::Most if near as i128 > n => near.next_down(),
        _ => near,
    };
    let inner = match bound {
        Bound::Least => (inner as i128).max(-MOST),
        Bound::Most => (inner as i128).min(MOST),
    };
    match i64::try_from(inner).ok().filter(|_| is_exact(inner)) {
        Some(inner) => *number = inner.into(),
        None => return Err(number.clone()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::hold;

    fn held(mut schema: Value, lenient: bool) -> Result<Value, String> {
        hold(&mut schema, lenient).map(|()| schema)
    }

    #[test]
    fn bounds_become_narrower_and_exact() {
        let (least, most) = (-9_223_372_036_854_774_784i64, 9_223_372_036_854_774_784i64);
        for (bounds, expected) in [
            (json!({"minimum": 9_007_199_254_740_993i64}), json!({"minimum": 9_007_199_254_740_994i64})),
            (json!({"maximum": 9_007_199_254_740_993i64}), json!({"maximum": 9_007_199_254_740_992i64})),
            (json!({"minimum": -9_007_199_254_740_993i64}), json!({"minimum": -9_007_199_254_740_992i64})),
            (
                json!({"exclusiveMaximum": -9_007_199_254_740_993i64}),
                json!({"exclusiveMaximum": -9_007_199_254_740_994i64}),
            ),
            (json!({"minimum": i64::MIN, "maximum": i64::MAX}), json!({"minimum": least, "maximum": most})),
            (json!({"minimum": 0, "maximum": u64::MAX}), json!({"minimum": 0, "maximum": most})),
            (json!({"minimum": 0.1, "maximum": 1e300}), json!({"minimum": 0.1, "maximum": 1e300})),
            (
                json!({"default": i64::MAX, "const": 1i64 << 60}),
                json!({"default": i64::MAX, "const": 1i64 << 60}),
            ),
        ] {
            let nested =
                |bounds: &Value| json!({"properties": {"const": {"anyOf": [bounds]}}, "items": bounds});
            assert_eq!(held(nested(&bounds), false), Ok(nested(&expected)));
        }
    }

    #[test]
    fn values_that_would_be_others_are_not_demanded() {
        for schema in [
            json!({"enum": [1, 1_795_947_594_123_456_789i64]}),
            json!({"const": {"id": [-9_007_199_254_740_993i64]}}),
            json!({"const": u64::MAX}),
            json!({"minimum": 1u64 << 63}),
        ] {
            let schema = json!({"type": "object", "properties": {"id": schema}});
            let error = held(schema.clone(), false).unwrap_err();
            assert!(error.contains("2^53"), "{error}");
            let left_out = held(schema, true).unwrap()["properties"]["id"].clone();
            assert!(
                left_out.as_object().unwrap().keys().all(|keyword| keyword.contains(" with ")),
                "{left_out}"
            );
        }
    }
}
