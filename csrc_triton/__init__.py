"""All Triton kernels of npo_kernels, one file per kernel family. Only `npo_kernels.backends.triton` launches them.

| file              | kernels                                            | purpose                                     |
|-------------------|----------------------------------------------------|---------------------------------------------|
| compaction        | count_scored_kernel, write_rows_kernel,            | find the scored positions, gather their     |
|                   | gather_rows_kernel                                 | hidden states                               |
| target_logit      | target_logit_kernel                                | target logit of each row: a gathered dot    |
| exp_logits        | exp_logits_kernel, exp_logits_persistent_kernel    | product, exponentials, partial sums         |
| row_statistics    | reanchor_kernel, row_statistics_kernel             | overflow repair; logp and 1 - p_y           |
| row_moments       | row_moments_kernel, row_moments_persistent_kernel, | moments of the logits, and their gradient   |
|                   | moment_gradient_kernel                             |                                             |
| sequence_epilogue | sequence_sums_kernel, sequence_scale_kernel,       | sequence sums, NPO and SimNPO losses,       |
|                   | ratio_epilogue_kernel, coefficients_kernel         | gradient coefficients of each row           |
| linear_kl         | softmax_sums_kernel, softmax_sums_persistent_kernel| two products: softmax normalizers, KL and   |
|                   | kl_logits_kernel, kl_logits_persistent_kernel      | its gradient                                |
| gradient_rows     | scale_rows_kernel, finish_hidden_grad_kernel,      | O(NH) terms of dHidden and dWeight, and the |
|                   | add_targets_kernel, scale_gradient_kernel          | product with the upstream gradient          |
| common            |                                                    | device functions that kernels call          |
| tiles             |                                                    | tile shapes per GPU: data, no code          |

Names: every launched kernel ends in `_kernel`. Its launcher and its PyTorch counterpart in `npo_kernels.backends` have
the same name without the suffix. Device functions have no suffix either.

Symbols: N rows (scored positions), H hidden size, V vocabulary columns (or those of a slice), B sequences.

Conventions: offsets that can pass 2^31 are int64 before they are multiplied by a stride. Vectors are converted to
float32 on load; matrix operands keep their dtype and accumulate in float32. Ragged edges are clamped on load and masked
on store, so no kernel reads, writes or counts anything outside a tensor.
"""
