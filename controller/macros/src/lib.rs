//! `#[millstream::block]`: makes a Rust function a block.
//!
//! Syntax only: what a block is and how it is called lives in `millstream`, which re-exports the macro. Misuse is a
//! compile error that says what to write instead.

use proc_macro::TokenStream;
use proc_macro2::TokenStream as Tokens;
use quote::{quote, quote_spanned};
use syn::{Attribute, FnArg, Ident, ItemFn, Pat, Type, parse_quote, spanned::Spanned};

/// Makes a function a block that any stream can run: the function is replaced by one of the same name, visibility and
/// arguments that returns a `millstream::Block`.
///
/// The function is called in a process of its own, on the host of the stream. Its arguments travel as JSON, so each is an
/// owned type with `serde::Serialize` and `serde::de::DeserializeOwned`. A first argument of type `&mut BlockContext` does
/// not travel: it gives barriers, topics, parameters and places for results. The function returns
/// `millstream::BlockResult<T>`, another `Result<T, E>`, or nothing; an error or a panic makes the block fail, and the value
/// is had with `outcome.value::<T>()`.
///
/// ```ignore
/// #[millstream::block]
/// fn netserver(ctx: &mut BlockContext, parties: usize) -> BlockResult {
///     ctx.barrier("setup", parties)?;
///     Ok(())
/// }
///
/// stream.run_bg(netserver(2));
/// ```
#[proc_macro_attribute]
pub fn block(attribute: TokenStream, item: TokenStream) -> TokenStream {
    let block = make(&attribute.into(), item.into());
    block.unwrap_or_else(syn::Error::into_compile_error).into()
}

fn make(attribute: &Tokens, item: Tokens) -> syn::Result<Tokens> {
    let no_function =
        |error: syn::Error| syn::Error::new(error.span(), "`#[millstream::block]` stands on a function");
    let function = syn::parse2::<ItemFn>(item).map_err(no_function)?;
    let checked = if attribute.is_empty() {
        check(&function)
    } else {
        let message =
            "`#[millstream::block]` takes no arguments: say more with the methods of the block it makes";
        Err(syn::Error::new_spanned(attribute, message))
    };
    checked.and_then(|()| expand(&function))
}

/// What no block can be.
fn check(function: &ItemFn) -> syn::Result<()> {
    let signature = &function.sig;
    let refuse = |tokens: &dyn quote::ToTokens, message| Err(syn::Error::new_spanned(tokens, message));
    if let Some(word) = &signature.asyncness {
        return refuse(
            word,
            "a block is a plain function, called in a process of its own: start a runtime inside it",
        );
    }
    if let Some(word) = &signature.unsafety {
        return refuse(word, "a block is called from elsewhere, so it must be safe to call");
    }
    if let Some(word) = &signature.constness {
        return refuse(word, "a block runs on a host: it cannot be `const`");
    }
    if let Some(abi) = &signature.abi {
        return refuse(abi, "a block is a plain Rust function");
    }
    if let Some(first) = signature.generics.params.first() {
        return refuse(
            first,
            "a block has no type or lifetime parameters: its arguments travel, so their types must be known",
        );
    }
    if let Some(variadic) = &signature.variadic {
        return refuse(variadic, "a block has a fixed number of arguments");
    }
    Ok(())
}

/// One argument that travels.
struct Argument {
    name: Ident,
    kind: Type,
}

fn expand(function: &ItemFn) -> syn::Result<Tokens> {
    let mut arguments = Vec::new();
    let mut has_context = false;
    for (index, argument) in function.sig.inputs.iter().enumerate() {
        match argument {
            FnArg::Receiver(receiver) => {
                let message = "a block is a function outside of any type: pass what it needs as arguments";
                return Err(syn::Error::new_spanned(receiver, message));
            }
            FnArg::Typed(typed) if index == 0 && is_context(&typed.ty)? => has_context = true,
            FnArg::Typed(typed) => arguments.push(argument_of(&typed.pat, &typed.ty)?),
        }
    }

    let name = &function.sig.ident;
    let visibility = &function.vis;
    let (outer, inner): (Vec<&Attribute>, Vec<&Attribute>) =
        function.attrs.iter().partition(|attribute| is_outer(attribute));
    let body = body_function(function, &inner);

    let names: Vec<&Ident> = arguments.iter().map(|argument| &argument.name).collect();
    let kinds: Vec<&Type> = arguments.iter().map(|argument| &argument.kind).collect();
    // A type that cannot travel is an error at the type.
    let travels = kinds.iter().map(|kind| {
        quote_spanned! { kind.span() => ::millstream::__private::assert_travels::<#kind>(); }
    });
    let context = has_context.then(|| quote! { context, });
    let text = name.to_string();
    let text = text.strip_prefix("r#").unwrap_or(&text);

    let returned = function.sig.output.span();
    let call = quote_spanned! { returned =>
        ::millstream::__private::BlockReturn::into_value(#name(#context #(#names),*))
    };
    Ok(quote! {
        #(#outer)*
        #visibility fn #name(#(#names: #kinds),*) -> ::millstream::Block {
            #body

            #[::millstream::__private::linkme::distributed_slice(::millstream::__private::FUNCTIONS)]
            #[linkme(crate = ::millstream::__private::linkme)]
            #[allow(unsafe_code, reason = "a registration is a static in a section of its own")]
            static __MILLSTREAM_FUNCTION: ::millstream::__private::Function = ::millstream::__private::Function {
                key: ::core::concat!(
                    ::core::module_path!(), "::", #text, "@", ::core::line!(), ":", ::core::column!()
                ),
                name: #text,
                arguments: &[#(::core::stringify!(#names)),*],
                run: |context, mut arguments| {
                    let _ = &context;
                    let _ = &mut arguments;
                    #(#travels)*
                    #(let #names: #kinds = arguments.next(::core::stringify!(#names))?;)*
                    #call
                },
            };

            let call = ::millstream::__private::Call::new(&__MILLSTREAM_FUNCTION);
            #(let call = call.argument(::core::stringify!(#names), &#names);)*
            call.into_block()
        }
    })
}

/// The function as it was written, but for the attributes that belong to its replacement.
fn body_function(function: &ItemFn, inner: &[&Attribute]) -> Tokens {
    let mut body = function.clone();
    body.attrs.clear();
    body.vis = parse_quote!();
    quote! { #(#inner)* #body }
}

/// Attributes about the name that others use, not about the code.
fn is_outer(attribute: &Attribute) -> bool {
    ["doc", "cfg", "deprecated", "must_use"].iter().any(|name| attribute.path().is_ident(name))
}

/// Whether the first argument is the context; a reference to anything else is refused by `argument_of`.
fn is_context(kind: &Type) -> syn::Result<bool> {
    let (is_context, reference) = match kind {
        Type::Reference(reference) => (names_context(&reference.elem), Some(reference)),
        other => (names_context(other), None),
    };
    match reference {
        _ if !is_context => Ok(false),
        Some(reference) if reference.mutability.is_some() => Ok(true),
        _ => Err(syn::Error::new_spanned(kind, "take the context as `&mut BlockContext`")),
    }
}

fn names_context(kind: &Type) -> bool {
    matches!(kind, Type::Path(path) if path.path.segments.last().is_some_and(|last| last.ident == "BlockContext"))
}

fn argument_of(pattern: &Pat, kind: &Type) -> syn::Result<Argument> {
    match kind {
        Type::Reference(reference) => {
            let names_context = names_context(&reference.elem);
            let message = if names_context {
                "the context is the first argument of a block"
            } else {
                "arguments of a block travel to another process: take an owned type, such as `String` for `&str` or `Vec<T>` for `&[T]`"
            };
            return Err(syn::Error::new_spanned(kind, message));
        }
        Type::ImplTrait(_) => {
            let message = "arguments of a block travel to another process: name a type";
            return Err(syn::Error::new_spanned(kind, message));
        }
        _ => {}
    }
    match pattern {
        Pat::Ident(ident) if ident.by_ref.is_none() && ident.subpat.is_none() => {
            Ok(Argument { name: ident.ident.clone(), kind: kind.clone() })
        }
        _ => Err(syn::Error::new_spanned(pattern, "an argument of a block has a plain name")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(attribute: &str, item: &str) -> String {
        let tokens = |text: &str| text.parse::<Tokens>().expect("the text is Rust");
        make(&tokens(attribute), tokens(item)).expect_err("it is misuse").to_string()
    }

    #[test]
    fn misuse_is_told_what_to_write_instead() {
        let refusals = [
            ("", "struct A;", "`#[millstream::block]` stands on a function"),
            (
                "timeout = 3",
                "fn f() {}",
                "`#[millstream::block]` takes no arguments: say more with the methods of the block it makes",
            ),
            (
                "",
                "async fn f() {}",
                "a block is a plain function, called in a process of its own: start a runtime inside it",
            ),
            ("", "unsafe fn f() {}", "a block is called from elsewhere, so it must be safe to call"),
            ("", "const fn f() {}", "a block runs on a host: it cannot be `const`"),
            ("", "extern \"C\" fn f() {}", "a block is a plain Rust function"),
            (
                "",
                "fn f<T>(a: T) {}",
                "a block has no type or lifetime parameters: its arguments travel, so their types must be known",
            ),
            (
                "",
                "fn f(&self) {}",
                "a block is a function outside of any type: pass what it needs as arguments",
            ),
            ("", "fn f(ctx: &BlockContext) {}", "take the context as `&mut BlockContext`"),
            ("", "fn f(ctx: BlockContext) {}", "take the context as `&mut BlockContext`"),
            ("", "fn f(a: u8, ctx: &mut BlockContext) {}", "the context is the first argument of a block"),
            (
                "",
                "fn f(a: &str) {}",
                "arguments of a block travel to another process: take an owned type, such as `String` for `&str` or `Vec<T>` for `&[T]`",
            ),
            ("", "fn f(a: impl Copy) {}", "arguments of a block travel to another process: name a type"),
            ("", "fn f((a, b): (u8, u8)) {}", "an argument of a block has a plain name"),
        ];
        for (attribute, item, expected) in refusals {
            assert_eq!(refusal(attribute, item), expected, "{item}");
        }
    }

    #[test]
    fn the_block_keeps_name_visibility_and_arguments() {
        let item = "/// Serves.\npub(crate) fn serve(ctx: &mut BlockContext, mut port: u16) -> BlockResult<u64> { Ok(1) }";
        let made =
            make(&Tokens::new(), item.parse().expect("the text is Rust")).expect("it is a block").to_string();
        assert!(made.contains("pub (crate) fn serve (port : u16) -> :: millstream :: Block"), "{made}");
        assert!(made.starts_with("# [doc"), "{made}");
    }
}
