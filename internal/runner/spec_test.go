package runner

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// A party's devices are found again in its directory; that a site declares none differs from that a party has none of them.
func TestDevices(t *testing.T) {
	for _, c := range []struct {
		gpus []string
		kv   string
		ok   bool
	}{
		{nil, "CUDA_VISIBLE_DEVICES=", false},
		{[]string{}, "CUDA_VISIBLE_DEVICES=", true},
		{[]string{"0"}, "CUDA_VISIBLE_DEVICES=0", true},
		{[]string{"GPU-8932f937", "3"}, "CUDA_VISIBLE_DEVICES=GPU-8932f937,3", true},
	} {
		dir := t.TempDir()
		if err := writeFile(filepath.Join(dir, specFile), Spec{Party: "a", GPUs: c.gpus}); err != nil {
			t.Fatal(err)
		}
		s, err := readSpec(dir)
		if err != nil {
			t.Fatal(err)
		}
		if kv, ok := s.DeviceEnv(); kv != c.kv || ok != c.ok || !slices.Equal(s.GPUs, c.gpus) {
			t.Errorf("%v gives %v, %q, %v; want %q, %v", c.gpus, s.GPUs, kv, ok, c.kv, c.ok)
		}
	}
	// What an earlier Pergola wrote names none.
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, specFile), []byte(`{"party": "a"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if s, err := readSpec(dir); err != nil || s.GPUs != nil {
		t.Errorf("%v, %v", s.GPUs, err)
	}
}
