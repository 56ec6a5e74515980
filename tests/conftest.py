"""One thread, the same property tests in every run, and the tests that `make test-fast` leaves out."""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("blocklocal", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("blocklocal")

# Modules, and tests of others, that start processes, train, compile or try hundreds of inputs: by far the most of the
# time of all tests together.
SLOW = {
    "test_agent",
    "test_alignment",
    "test_alignment_weights",
    "test_bench",
    "test_compare",
    "test_damaged_runs",
    "test_environment",
    "test_gpu_script",
    "test_internals",
    "test_initial",
    "test_launch",
    "test_lock",
    "test_memory_plan",
    "test_one_block",
    "test_one_block_refusals",
    "test_own_rule",
    "test_package",
    "test_part",
    "test_pipeline",
    "test_pipeline_bench",
    "test_pipeline_example",
    "test_pipeline_lookahead",
    "test_pipeline_random",
    "test_pipeline_simulator",
    "test_pipeline_wrong_calls",
    "test_readme_figure",
    "test_plan",
    "test_recompute",
    "test_replicas",
    "test_report",
    "test_study",
    "test_terminal",
    "test_text",
    "test_train",
    "test_trial",
    "test_trust",
    "test_a_compiled_region_holds_block_border_and_loss",
    "test_a_report_on_wild_names",
    "test_backward_is_one_backward_of_the_sum",
    "test_built_in_models",
    "test_compiled_blocks_learn_the_same",
    "test_evidence_never_holds_all_pairs",
    "test_no_private_name_of_torch_is_used",
    "test_names_of_things_do_not_lead_out_of_a_folder",
    "test_nothing_is_left_after_a_thousand_steps",
    "test_one_line_says_it_and_nothing_is_left",
    "test_python_runs_and_prints_about_what_stands_beside_it",
    "test_random_cuts_compose_to_the_model",
    "test_residual_units_are_the_plain_ones",
    "test_the_demo_compares_two_runs",
}

# Left to `make faults`: modules of what is seldom changed, and tests of which a cheaper one makes the same claim for
# another case.
LONG = {
    "test_environment",
    "test_gpu_script",
    "test_lock",
    "test_pipeline_bench",
    "test_terminal",
    "test_a_bench_keeps_its_command",
    "test_a_compiled_region_holds_block_border_and_loss[True]",
    "test_a_first_run_that_cannot_begin_is_one_line_and_leaves_nothing",
    "test_a_process_killed_while_it_writes_loses_nothing[flush-9-3]",
    "test_a_process_may_start_later_than_others_have_patience",
    "test_a_process_that_never_comes_is_not_waited_for_for_ever",
    "test_a_report_on_wild_names",
    "test_a_study_from_its_grid_to_its_picture",
    "test_a_torch_without_a_name_lacks_what_needs_it_and_nothing_else",
    "test_an_interruption_at_the_start_is_one_line",
    "test_an_output_of_ascii_alone",
    "test_blocks_are_placed_evenly_and_as_measured",
    "test_blocks_take_less_memory",
    "test_clipping_and_accumulation_are_those_of_one_process_in_either_arithmetic[bf16-2]",
    "test_control_c_ends_all_and_another_number_of_processes_goes_on[numbers0]",
    "test_every_rule_trains[pred]",
    "test_it_goes_on_between_two_refreshes_on_another_number_of_processes[6]",
    "test_it_is_compared_with_backpropagation_and_measured",
    "test_killed_series_goes_on_where_it_was",
    "test_memory_grows_with_the_batch_and_with_depth",
    "test_memory_that_was_freed_is_taken_again_without_page_faults",
    "test_one_line_says_it_and_nothing_is_left['train --model=vit --statistic=grid']",
    "test_page_in_a_browser[500]",
    "test_processes_need_nobody_who_listens",
    "test_records_and_their_ratios",
    "test_replicas_learn_the_same_on_one_rank_and_on_two",
    "test_resuming_restores_what_is_random[changes2]",
    "test_resuming_restores_what_is_random[changes3]",
    "test_resuming_restores_what_is_random[changes4]",
    "test_rows_are_kept_and_done_once_and_what_was_cut_off_goes_on",
    "test_torchrun_runs_the_same_command",
    "test_training_needs_nobody_who_listens[>&- 2>&-]",
    "test_two_that_start_at_once",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {item.path.stem, getattr(item, "originalname", item.name)} & SLOW:
            item.add_marker("slow")
        if {item.path.stem, getattr(item, "originalname", item.name), item.name} & LONG:
            item.add_marker("long")
