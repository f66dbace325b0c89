package bundle

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Format is what a manifest calls itself. A change of the manifest's meaning changes it.
const Format = "pergola-bundle/1"

// Limits of what one path of a bundle may be, and of the manifest's own size. A manifest is the only
// part of a bundle that is held in memory.
const (
	MaxPath     = 1024     // bytes
	MaxName     = 255      // bytes of one component, as the usual file systems have it
	MaxDepth    = 64       // components
	MaxManifest = 16 << 20 // bytes
	MaxPart     = 16 << 20 // bytes of the lock and of the job's configuration, each
)

// Kind tells what an Entry is.
type Kind string

// The kinds of entries. A directory has an entry of its own only if nothing is in it; the others follow from
// the paths of their files.
const (
	File Kind = "file"
	Link Kind = "link"
	Dir  Kind = "dir"
)

// Entry is one file of the app. Times, owners and permissions other than "may be executed" are left
// out, so that the same app has the same digest wherever it is checked out.
type Entry struct {
	Path   string `json:"path"` // relative to the app's directory, with slashes
	Kind   Kind   `json:"kind"`
	Size   int64  `json:"size,omitempty"`   // bytes; files only
	Exec   bool   `json:"exec,omitempty"`   // mode 0755, else 0644; files only
	SHA256 string `json:"sha256,omitempty"` // lower-case hex; files only
	Target string `json:"target,omitempty"` // links only: relative, never outside of the app
}

// Part is a file of the bundle that does not belong to the app.
type Part struct {
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
}

// Meta says which app it is, as its pyproject.toml has it.
type Meta struct {
	Name    string `json:"name"`
	Version string `json:"version"`
}

// Manifest lists what is in a bundle. Its digest stands for the whole bundle, byte for byte.
type Manifest struct {
	Format string  `json:"format"`
	App    Meta    `json:"app"`
	Lock   Part    `json:"lock"`
	Job    Part    `json:"job"`
	Files  []Entry `json:"files"` // sorted by path, bytewise
}

// Encode gives the canonical bytes: what is digested, stored and sent.
func (m *Manifest) Encode() ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(m); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// Digest gives "sha256:" and the hex digest of the canonical bytes.
func (m *Manifest) Digest() (string, error) {
	b, err := m.Encode()
	if err != nil {
		return "", err
	}
	return "sha256:" + sum(b), nil
}

// Size gives the bytes of all files of the app.
func (m *Manifest) Size() int64 {
	var n int64
	for _, e := range m.Files {
		n += e.Size
	}
	return n
}

func sum(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}

// ParseManifest reads a manifest and refuses one that is not canonical, names unsafe paths, has links that
// leave the app or loop, or is beyond the limits. The error is plain; callers say whose manifest it was.
func ParseManifest(b []byte, lim Limits) (*Manifest, error) {
	if len(b) > MaxManifest {
		return nil, fmt.Errorf("the manifest has %d bytes, more than %d", len(b), MaxManifest)
	}
	var m Manifest
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&m); err != nil {
		return nil, fmt.Errorf("the manifest cannot be read: %w", err)
	}
	if m.Format != Format {
		return nil, fmt.Errorf("the manifest has the format %.40q, this program knows %q", m.Format, Format)
	}
	// Two texts for one meaning would be two digests for one bundle, and room for parsers to disagree.
	if again, err := m.Encode(); err != nil || !bytes.Equal(again, b) {
		return nil, fmt.Errorf("the manifest is not in its canonical form")
	}
	if err := m.check(lim.orDefaults()); err != nil {
		return nil, err
	}
	return &m, nil
}

// check holds m against every rule.
func (m *Manifest) check(lim Limits) error {
	for name, p := range map[string]Part{lockName: m.Lock, jobName: m.Job} {
		if p.Size < 0 || p.Size > MaxPart || !isHex256(p.SHA256) {
			return fmt.Errorf("%s has no proper size or digest", name)
		}
	}
	var size int64
	for i, e := range m.Files {
		if i > 0 && m.Files[i-1].Path >= e.Path {
			return fmt.Errorf("%q is out of order or there twice", e.Path)
		}
		if err := e.check(); err != nil {
			return err
		}
		if size += e.Size; size < 0 || size > lim.MaxBytes {
			return fmt.Errorf("the files have more than %d bytes together", lim.MaxBytes)
		}
	}
	t, err := newTree(m.Files, lim.MaxFiles)
	if err != nil {
		return err
	}
	return t.checkLinks()
}

func (e Entry) check() error {
	if err := checkPath(e.Path); err != nil {
		return err
	}
	zero := Entry{Path: e.Path, Kind: e.Kind}
	switch e.Kind {
	case File:
		if e.Size < 0 || !isHex256(e.SHA256) || e.Target != "" {
			return fmt.Errorf("%q has no proper size or digest", e.Path)
		}
	case Link:
		zero.Target = e.Target
		if e != zero {
			return fmt.Errorf("%q is a link with a file's properties", e.Path)
		}
		return checkTarget(e)
	case Dir:
		if e != zero {
			return fmt.Errorf("%q is a directory with a file's properties", e.Path)
		}
	default:
		return fmt.Errorf("%q is of an unknown kind %.20q", e.Path, e.Kind)
	}
	return nil
}

// checkPath holds a path against the rules for names that are safe to create and to print anywhere.
func checkPath(p string) error {
	switch {
	case len(p) > MaxPath:
		return fmt.Errorf("%.60q… is longer than %d bytes", p, MaxPath)
	case !utf8.ValidString(p):
		return fmt.Errorf("%q is not valid UTF-8", p)
	case p == "." || !fs.ValidPath(p):
		return fmt.Errorf("%q is not a path inside the app", p)
	case strings.ContainsFunc(p, unicode.IsControl):
		return fmt.Errorf("%q has control characters", p)
	case strings.Count(p, "/") >= MaxDepth:
		return fmt.Errorf("%.60q… is more than %d folders deep", p, MaxDepth)
	}
	for name := range strings.SplitSeq(p, "/") {
		if len(name) > MaxName {
			return fmt.Errorf("%.60q… has a name of more than %d bytes", p, MaxName)
		}
	}
	return nil
}

func checkTarget(e Entry) error {
	switch t := e.Target; {
	case t == "" || len(t) > MaxPath || !utf8.ValidString(t) || strings.ContainsFunc(t, unicode.IsControl):
		return fmt.Errorf("%q is a link with an improper target", e.Path)
	case path.IsAbs(t):
		return fmt.Errorf("%q is a link to the absolute path %q", e.Path, t)
	}
	return nil
}

func isHex256(s string) bool {
	if len(s) != 2*sha256.Size {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// tree is the shape of the app that entries describe, for following links without a disk: the site
// decides on a bundle's links before it has written anything.
type tree struct {
	entries map[string]Entry
	dirs    map[string]bool     // every folder; "." is the app itself
	edges   map[string][]string // from a folder to those in it, and to those that links in it lead to
	links   []Entry
}

func newTree(files []Entry, maxFiles int) (*tree, error) {
	count := 0
	t := &tree{entries: make(map[string]Entry, len(files)), dirs: map[string]bool{".": true}, edges: map[string][]string{}}
	for _, e := range files {
		t.entries[e.Path] = e
		if e.Kind == Link {
			t.links = append(t.links, e)
		}
		child := e.Path
		if e.Kind != Dir {
			child = path.Dir(e.Path)
		}
		for p := child; !t.dirs[p]; p = path.Dir(p) {
			t.dirs[p] = true
			count++
			t.edges[path.Dir(p)] = append(t.edges[path.Dir(p)], p)
		}
		if e.Kind != Dir { // whose folder was counted
			count++
		}
		if count > maxFiles {
			return nil, fmt.Errorf("there are more than %d files and folders", maxFiles)
		}
	}
	for _, e := range files {
		if parent := path.Dir(e.Path); parent != "." {
			if p, listed := t.entries[parent]; listed {
				return nil, fmt.Errorf("%q lies in %q, which is listed as a %s of its own", e.Path, parent, p.Kind)
			}
		}
		if t.dirs[e.Path] && e.Kind != Dir {
			return nil, fmt.Errorf("%q is both a %s and a folder", e.Path, e.Kind)
		}
		if inside := t.edges[e.Path]; len(inside) > 0 {
			return nil, fmt.Errorf("%q lies in %q, which is listed as a %s of its own", inside[0], e.Path, e.Kind)
		}
	}
	return t, nil
}

// Links are followed as the kernel does it, with its limit on links; the limit on steps keeps a hostile manifest
// from costing more than a moment.
const (
	maxFollow = 40
	maxSteps  = 1000
)

// resolve gives the entry or directory that a link leads to.
func (t *tree) resolve(link Entry) (string, error) {
	at := path.Dir(link.Path)
	todo := strings.Split(link.Target, "/")
	for follow, steps := 0, 0; len(todo) > 0; steps++ {
		name := todo[0]
		todo = todo[1:]
		if !t.dirs[at] || steps > maxSteps {
			return "", fmt.Errorf("%q is a link to %q, which is not in the app", link.Path, link.Target)
		}
		switch name {
		case "", ".":
			continue
		case "..":
			if at == "." {
				return "", fmt.Errorf("%q is a link to %q, which is outside of the app", link.Path, link.Target)
			}
			at = path.Dir(at)
			continue
		}
		next := path.Join(at, name)
		e, isEntry := t.entries[next]
		if !t.dirs[next] && !isEntry {
			return "", fmt.Errorf("%q is a link to %q, which is not in the app", link.Path, link.Target)
		}
		if e.Kind != Link {
			at = next
			continue
		}
		if follow++; follow > maxFollow {
			return "", fmt.Errorf("%q is a link that leads to itself", link.Path)
		}
		todo = append(strings.Split(e.Target, "/"), todo...)
	}
	return at, nil
}

// checkLinks refuses links that lead nowhere or outside, and those that make a folder contain
// itself: whatever walks the app at a site (Python's import, an app's own glob) would not come to an end.
func (t *tree) checkLinks() error {
	via := map[[2]string]string{} // an edge's link, for the message
	for _, l := range t.links {
		to, err := t.resolve(l)
		if err != nil {
			return err
		}
		if t.dirs[to] {
			from := path.Dir(l.Path)
			t.edges[from] = append(t.edges[from], to)
			via[[2]string{from, to}] = l.Path
		}
	}
	if len(via) == 0 {
		return nil
	}
	const open, finished = 1, 2
	state := map[string]int{}
	type step struct {
		dir  string
		next int
	}
	stack := []step{{dir: "."}}
	state["."] = open
	for len(stack) > 0 {
		top := &stack[len(stack)-1]
		if top.next == len(t.edges[top.dir]) {
			state[top.dir] = finished
			stack = stack[:len(stack)-1]
			continue
		}
		child := t.edges[top.dir][top.next]
		top.next++
		switch state[child] {
		case finished:
		case open:
			// The cycle is the end of the stack from child on, and at least one of its edges is a link.
			stack = append(stack, step{dir: child})
			i := slices.IndexFunc(stack, func(s step) bool { return s.dir == child })
			for ; i+1 < len(stack); i++ {
				if l, ok := via[[2]string{stack[i].dir, stack[i+1].dir}]; ok {
					return fmt.Errorf("%q is a link that makes the folder %q contain itself", l, child)
				}
			}
			return fmt.Errorf("the folder %q contains itself", child)
		default:
			state[child] = open
			stack = append(stack, step{dir: child})
		}
	}
	return nil
}
