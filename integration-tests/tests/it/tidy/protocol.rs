//! Rules for the protocol: everything named has its comment, services and their messages are named alike, zero is
//! nothing. Reads the descriptor set that reflection serves, so what holds here holds for `grpcurl describe`.

use std::collections::BTreeSet;

use prost::Message as _;
use prost_types::{DescriptorProto, EnumDescriptorProto, FileDescriptorProto, FileDescriptorSet};

use super::report;

fn our_files() -> Vec<FileDescriptorProto> {
    let set = FileDescriptorSet::decode(millstream_proto::FILE_DESCRIPTOR_SET).unwrap();
    let files: Vec<_> =
        set.file.into_iter().filter(|file| file.package().starts_with("millstream.")).collect();
    assert!(files.len() >= 5, "{} files", files.len());
    files
}

/// Every name of a file with the path by which its comment is found; the numbers are those of `descriptor.proto`.
fn named(file: &FileDescriptorProto) -> Vec<(Vec<i32>, String)> {
    fn number(index: usize) -> i32 {
        i32::try_from(index).unwrap()
    }
    fn enumeration(
        path: Vec<i32>,
        prefix: &str,
        item: &EnumDescriptorProto,
        out: &mut Vec<(Vec<i32>, String)>,
    ) {
        let name = format!("{prefix}.{}", item.name());
        for (index, value) in item.value.iter().enumerate() {
            out.push(([path.as_slice(), &[2, number(index)]].concat(), format!("{name}.{}", value.name())));
        }
        out.push((path, name));
    }
    fn message(path: Vec<i32>, prefix: &str, item: &DescriptorProto, out: &mut Vec<(Vec<i32>, String)>) {
        let name = format!("{prefix}.{}", item.name());
        for (index, field) in item.field.iter().enumerate() {
            out.push(([path.as_slice(), &[2, number(index)]].concat(), format!("{name}.{}", field.name())));
        }
        for (index, oneof) in item.oneof_decl.iter().enumerate() {
            // `optional` makes a oneof of its own that nobody wrote.
            if !oneof.name().starts_with('_') {
                out.push((
                    [path.as_slice(), &[8, number(index)]].concat(),
                    format!("{name}.{}", oneof.name()),
                ));
            }
        }
        for (index, nested) in item.nested_type.iter().enumerate() {
            message([path.as_slice(), &[3, number(index)]].concat(), &name, nested, out);
        }
        for (index, nested) in item.enum_type.iter().enumerate() {
            enumeration([path.as_slice(), &[4, number(index)]].concat(), &name, nested, out);
        }
        out.push((path, name));
    }
    let mut out = Vec::new();
    for (index, item) in file.message_type.iter().enumerate() {
        message(vec![4, number(index)], file.package(), item, &mut out);
    }
    for (index, item) in file.enum_type.iter().enumerate() {
        enumeration(vec![5, number(index)], file.package(), item, &mut out);
    }
    for (index, service) in file.service.iter().enumerate() {
        let name = format!("{}.{}", file.package(), service.name());
        for (method_index, method) in service.method.iter().enumerate() {
            out.push((vec![6, number(index), 2, number(method_index)], format!("{name}.{}", method.name())));
        }
        out.push((vec![6, number(index)], name));
    }
    out
}

#[test]
fn everything_named_has_its_comment() {
    let mut complaints = Vec::new();
    for file in our_files() {
        let commented: BTreeSet<Vec<i32>> = file
            .source_code_info
            .iter()
            .flat_map(|info| &info.location)
            .filter(|location| !location.leading_comments().trim().is_empty())
            .map(|location| location.path.clone())
            .collect();
        let names = named(&file);
        assert!(!names.is_empty());
        complaints
            .extend(names.into_iter().filter(|(path, _)| !commented.contains(path)).map(|(_, name)| name));
    }
    report("names without a comment", &complaints);
}

#[test]
fn services_and_their_messages_are_named_alike() {
    let mut complaints = Vec::new();
    for service in our_files().iter().flat_map(|file| &file.service) {
        if !service.name().ends_with("Service") {
            complaints.push(format!("{} does not end in `Service`", service.name()));
        }
        for method in &service.method {
            let name = method.name();
            if !method.input_type().ends_with(&format!(".{name}Request"))
                || !method.output_type().ends_with(&format!(".{name}Response"))
            {
                complaints.push(format!("{name}: {} -> {}", method.input_type(), method.output_type()));
            }
        }
    }
    report("services", &complaints);
}

#[test]
fn zero_is_unspecified_in_every_enumeration() {
    let files = our_files();
    let enumerations: Vec<&EnumDescriptorProto> = files.iter().flat_map(|file| &file.enum_type).collect();
    assert!(!enumerations.is_empty());
    let complaints: Vec<String> = enumerations
        .iter()
        .filter(|item| !item.value.iter().any(|v| v.number() == 0 && v.name().ends_with("_UNSPECIFIED")))
        .map(|item| item.name().to_owned())
        .collect();
    report("enumerations whose zero means something", &complaints);
}
