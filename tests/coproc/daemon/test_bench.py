"""kt-coproc bench: what it prints and refuses. No figure of time is checked: machines are as fast as they are."""

import json
import math

from harness import DaemonTest, main

SHAPE = ("--hidden", 64, "--intermediate", 32, "--experts", 8, "--top-k", 2, "--tokens", "1,33")
TINY = (*SHAPE, "--rank", 4)
QUICK = ("--threads", 2, "--samples", 1)


class Bench(DaemonTest):
    def layer(self, *flags):
        done = self.coproc("bench", "layer", "--json", *QUICK, *flags)
        self.assertEqual(done.returncode, 0, done.stderr)
        return json.loads(done.stdout)

    def assert_peaks(self, result, flops_key="bf16_flops"):
        self.assertEqual(result["schema"], 1)
        self.assertIsInstance(result["machine"], str)
        self.assertEqual(set(result["peaks"]), {flops_key, "dram_bytes_per_second"})
        for value in result["peaks"].values():
            self.assertGreater(value, 0)
            self.assertTrue(math.isfinite(value))

    def test_peaks_are_measured(self):
        done = self.coproc("bench", "peaks", "--json", "--threads", 2)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assert_peaks(json.loads(done.stdout))
        table = self.coproc("bench", "peaks", "--kernels", "scalar", "--weight-format", "fp32")
        self.assertEqual(table.returncode, 0, table.stderr)
        self.assertIn("scalar kernels", table.stdout)
        self.assertIn("GFLOP/s in fp32", table.stdout)

    def test_a_layer_has_a_row_for_each_direction_size_and_kind(self):
        result = self.layer(*TINY)
        self.assert_peaks(result)
        names = [(row["name"], row["tokens"]) for row in result["rows"]]
        kinds = ["forward", "backward", "forward lora", "backward lora"]
        self.assertEqual(names, [(kind, tokens) for tokens in (1, 33) for kind in kinds])
        for row in result["rows"]:
            self.assertEqual(row["routes"], 2 * row["tokens"])
            self.assertEqual(row["flops"], 2 * 3 * 64 * 32 * row["routes"])
            self.assertIn(row["of"], ("bf16_flops", "dram_bytes_per_second"))
            self.assertEqual(row["ratio"], max(row["ratio_of_peak"], row["ratio_of_dram"]))
            self.assertLessEqual(row["seconds"], row["seconds_median"])
            self.assertGreaterEqual(row["samples"], 1)
            self.assertLessEqual(row["samples"] + row["samples_discarded"], 3)
            self.assertNotIn("predicted_seconds", row)
            if "ratio_to_frozen" in row:  # Absent where no round had both undisturbed.
                self.assertIn("lora", row["name"])

    def test_bytes_follow_from_shapes_alone(self):
        rows = self.layer(*TINY)["rows"]
        for row in rows:
            stages = row["stages"]
            kinds = ("weight_bytes", "activation_bytes", "lora_bytes")
            totals = {kind: sum(stage[kind] for stage in stages) for kind in kinds}
            self.assertEqual(row["bytes"], sum(totals.values()))
            # Panels of 32 rows, not their pads: gate and up 2 of 64 columns, down 2 of 32; of 2 or all 8 experts.
            expert_bytes = 2 * (32 * 64 * 2) + 2 * (32 * 32 * 2)
            self.assertEqual(totals["weight_bytes"], min(row["routes"], 8) * expert_bytes)
            self.assertEqual(row["activation_bytes_per_route"], totals["activation_bytes"] / row["routes"])
            self.assertEqual(totals["lora_bytes"] > 0, "lora" in row["name"])
        again = self.layer(*TINY)["rows"]
        self.assertEqual([self.without_times(row) for row in rows], [self.without_times(row) for row in again])

    def without_times(self, row):
        stages = [{key: value for key, value in stage.items() if key != "worker_seconds"} for stage in row["stages"]]
        return [row["name"], row["tokens"], row["bytes"], row["barriers"], stages]

    def test_times_are_predicted_for_a_declared_machine(self):
        result = self.layer(*SHAPE, "--machine", "229e12,500e9", "--rank", 0)
        self.assertEqual(result["declared"], {"flops": 229e12, "dram_bytes_per_second": 500e9})
        self.assertEqual([row["name"] for row in result["rows"]], ["forward", "backward"] * 2)
        for row in result["rows"]:
            self.assertAlmostEqual(row["predicted_seconds"] * 500e9, row["bytes"])
        bound_by_compute = self.layer(*TINY, "--machine", "1e3,500e9")
        for row in bound_by_compute["rows"]:
            self.assertAlmostEqual(row["predicted_seconds"] * 1e3, row["flops"])

    def test_routing_can_be_skewed_and_weights_of_other_formats(self):
        self.assertEqual(self.layer(*TINY, "--skew", 1.0)["layer"]["skew"], 1.0)
        self.assert_peaks(self.layer(*TINY, "--weight-format", "fp32"), "fp32_flops")
        self.assertEqual(self.layer(*TINY, "--kernels", "scalar")["kernels"], "scalar")

    def test_without_json_it_prints_a_table(self):
        done = self.coproc("bench", "layer", *QUICK, *TINY, "--machine", "229e12,500e9")
        self.assertEqual(done.returncode, 0, done.stderr)
        for word in ("of peak", "of DRAM", "KB/route", "roofline", "predicted", "backward lora", "lora gradients"):
            self.assertIn(word, done.stdout)
        self.assertIn("round 1: sampled 1 33 tokens", done.stderr)

    def test_wrong_arguments_are_refused(self):
        bench = lambda *arguments: self.coproc("bench", *arguments)
        self.assert_error(bench(), 2, "kt-coproc bench --help")
        self.assert_error(bench("layers"), 2, "layers", "peaks, layer")
        self.assert_error(bench(""), 2, "peaks, layer")
        self.assert_error(bench("peaks", "--tokens", 1), 2, "--tokens")
        self.assert_error(bench("layer", "--tokens", "1,x"), 2, "--tokens")
        self.assert_error(bench("layer", "--tokens", "0"), 2, "--tokens")
        self.assert_error(bench("layer", "--experts", 4, "--top-k", 5), 2, "--top-k 5", "4")
        self.assert_error(bench("layer", "--rank", 257), 2, "--rank")
        self.assert_error(bench("layer", "--threads", 0), 2, "--threads")
        self.assert_error(bench("layer", "--skew", -1), 2, "--skew")
        self.assert_error(bench("layer", "--kernels", "sse"), 2, "sse")
        self.assert_error(bench("peaks", "--weight-format", "int2"), 2, "int2")
        self.assert_error(bench("peaks", "--weight-format", "fp32", "--kernels", "avx2"), 2, "scalar")
        for machine in ("229e12", "1,2,3", "0,1", "1,nan", "one,two"):
            self.assert_error(bench("layer", "--machine", machine), 2, "--machine")

    def test_a_layer_too_large_for_this_machine_is_refused_with_numbers(self):
        done = self.coproc("bench", "layer", *QUICK, "--hidden", 65536, "--intermediate", 65536, "--experts", 4096)
        self.assert_error(done, 69, "TB", "expert weights")

    def test_it_explains_itself(self):
        for arguments in (("bench", "--help"), ("bench", "layer", "--help"), ("bench", "peaks", "--help")):
            done = self.coproc(*arguments)
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertIn(" ".join(arguments[:-1]), done.stdout)


if __name__ == "__main__":
    main()
