package nvflare

import (
	"bytes"
	"errors"
	"io"
	"math"
	"strings"

	"go.yaml.in/yaml/v3"
)

// parseYAML reads YAML without what makes a document more than what stands there: aliases, merges and interpolations are
// refused.
func (f *file) parseYAML(src []byte) error {
	d := yaml.NewDecoder(bytes.NewReader(src))
	var doc yaml.Node
	if err := d.Decode(&doc); err != nil && !errors.Is(err, io.EOF) {
		return f.fault(nil, "", "correct the YAML", "it is not YAML (%s)", strings.TrimPrefix(err.Error(), "yaml: "))
	}
	if len(doc.Content) != 1 || doc.Content[0].Kind != yaml.MappingNode {
		return f.fault(nil, "", "write it like key: value", "it is no object")
	}
	var err error
	f.root, err = f.fromYAML(doc.Content[0], 0)
	return err
}

func (f *file) fromYAML(y *yaml.Node, depth int) (*node, error) {
	n := &node{line: y.Line}
	if depth > maxDepth {
		return nil, f.fault(n, "", "flatten it", "objects and lists are more than %d deep", maxDepth)
	}
	switch y.Kind {
	case yaml.MappingNode:
		n.kind, n.obj = kindObject, map[string]*node{}
		for i := 0; i+1 < len(y.Content); i += 2 {
			k := y.Content[i]
			if k.Kind != yaml.ScalarNode || k.ShortTag() == "!!merge" {
				return nil, f.fault(&node{line: k.Line}, "", "write the keys themselves", "only plain keys are read")
			}
			if n.get(k.Value) != nil {
				return nil, f.fault(&node{line: k.Line}, k.Value, "remove one", "the key is there twice")
			}
			v, err := f.fromYAML(y.Content[i+1], depth+1)
			if err != nil {
				return nil, err
			}
			v.line = k.Line
			n.set(k.Value, v)
		}
	case yaml.SequenceNode:
		n.kind = kindList
		for _, e := range y.Content {
			v, err := f.fromYAML(e, depth+1)
			if err != nil {
				return nil, err
			}
			n.list = append(n.list, v)
		}
	case yaml.ScalarNode:
		return n, f.scalarYAML(y, n)
	default:
		return nil, f.fault(n, "", "write the value itself", "aliases are not read")
	}
	return n, nil
}

func (f *file) scalarYAML(y *yaml.Node, n *node) error {
	if strings.Contains(y.Value, "${") {
		return f.fault(n, "", "write the value itself", "interpolations (${…}) are not read")
	}
	var err error
	switch y.ShortTag() {
	case "!!null":
	case "!!bool":
		n.kind, err = kindBool, y.Decode(&n.b)
	case "!!int":
		n.kind, err = kindInt, y.Decode(&n.i)
	case "!!float":
		if n.kind, err = kindFloat, y.Decode(&n.f); err == nil && (math.IsNaN(n.f) || math.IsInf(n.f, 0)) {
			err = errors.New("it is not finite")
		}
	case "!!str", "!!timestamp": // OmegaConf has no dates
		n.kind, n.s = kindString, y.Value
	default:
		return f.fault(n, "", "write plain text, numbers, true or false", "values of the type %s are not read", y.ShortTag())
	}
	if err != nil {
		return f.fault(n, "", "correct the value", "the value %.40q cannot be read (%v)", y.Value, err)
	}
	return nil
}
