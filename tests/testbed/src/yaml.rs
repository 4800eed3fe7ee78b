//! YAML as a policy is written in it, to the JSON that the module reads.

use saphyr::{LoadableYamlNode, Scalar, Yaml};
use serde_json::{Map, Value};

/// The one document in `text`, as JSON.
///
/// # Errors
/// What is no YAML, or has no counterpart in JSON.
pub fn json_from_yaml(text: &str) -> Result<Value, String> {
    let documents = Yaml::load_from_str(text).map_err(|error| error.to_string())?;
    match documents.as_slice() {
        [document] => convert(document),
        _ => Err(format!("expected one document, found {}", documents.len())),
    }
}

fn convert(node: &Yaml<'_>) -> Result<Value, String> {
    Ok(match node {
        Yaml::Value(scalar) => match scalar {
            Scalar::Null => Value::Null,
            Scalar::Boolean(value) => (*value).into(),
            Scalar::Integer(value) => (*value).into(),
            Scalar::FloatingPoint(value) if !value.is_finite() => return Err(format!("{value} is no number in JSON")),
            Scalar::FloatingPoint(value) => value.into_inner().into(),
            Scalar::String(text) => text.as_ref().into(),
        },
        Yaml::Sequence(items) => items.iter().map(convert).collect::<Result<_, _>>()?,
        Yaml::Mapping(entries) => {
            let entry = |(key, value): (&Yaml<'_>, _)| match key.as_str() {
                Some(key) => Ok((key.to_owned(), convert(value)?)),
                None => Err(format!("the key {key:?} is no string")),
            };
            Value::Object(entries.iter().map(entry).collect::<Result<Map<_, _>, _>>()?)
        }
        Yaml::Representation(..) | Yaml::Tagged(..) | Yaml::Alias(_) | Yaml::BadValue => {
            return Err(format!("{node:?} has no counterpart in JSON"));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_a_policy_is_made_of() {
        let text = "a: [1, 2.5, -3, true, null, ~]\nb: {c: \"true\", d: 5%, e: 300ms}\n# f\ng: &x {h: 1}\ni: *x\n";
        let expected = json!({
            "a": [1, 2.5, -3, true, null, null],
            "b": {"c": "true", "d": "5%", "e": "300ms"},
            "g": {"h": 1},
            "i": {"h": 1},
        });
        assert_eq!(json_from_yaml(text), Ok(expected));
    }

    #[test]
    fn what_json_cannot_say_is_refused() {
        for text in ["a: .nan", "1: a", "a: 1\na: 2", "a: [", "a\n---\nb", ""] {
            assert!(json_from_yaml(text).is_err(), "{text:?}: {:?}", json_from_yaml(text));
        }
    }
}
