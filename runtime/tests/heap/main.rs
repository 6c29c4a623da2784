//! What the heap goes through.
//!
//! The allocator counts the whole process, so nothing else may run in it: this is a program and not a set of tests.
#![allow(missing_docs, reason = "tests")]

mod counting;
#[path = "../cli/fixture.rs"]
#[allow(dead_code, reason = "the command's tests use the rest")]
mod fixture;
mod plan;
mod steps;

#[global_allocator]
static ALLOCATOR: counting::Counting = counting::Counting;

fn main() {
    steps::a_decode_step_allocates_nothing();
    plan::the_heap_of_tiny_models_is_as_planned();
    plan::the_heap_of_the_default_model_is_as_planned();
    println!("heap: all as it should be");
}
