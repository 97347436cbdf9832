//! Every kernel family on every instruction set that this machine has.

use cpu::{Isa, self_test};

#[test]
fn every_kernel_is_right_and_equal_on_all_instruction_sets() {
    for isa in Isa::ALL {
        let tests = self_test(isa);
        if !isa.is_available() {
            assert!(tests.is_empty());
            eprintln!("skipped: this CPU does not have {}", isa.name());
            continue;
        }
        assert_eq!(tests.len(), 19);
        for test in tests {
            assert!(test.passed, "{test:?}");
        }
    }
}
